"""The store, in a folder and at an address: whole or absent, whoever dies, whoever is first.

AIMFAIR_KILLS=200 kills so many processes in each kind of store, instead of 20: `pytest -m slow -k killed tests/test_store.py`."""
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pytest
import store_machines as machines
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from pace import slowness
from s3_server import S3Server, in_environment

from aimfair.cli import main
from aimfair.core import DataWarning
from aimfair.explore.sources import of_reproduction
from aimfair.repro import Artifact, Lease, Objects, RemoteStore, Shelf, Store, held, open_store, status, stored

KILLS = int(os.environ.get("AIMFAIR_KILLS", 20))
ONE = Artifact("s", {"n": 1})
new = itertools.count()


@pytest.fixture(scope="module")
def s3():
    server = S3Server()
    with in_environment(server.environment):
        yield server
    server.close()


@pytest.fixture
def memory():
    "An address in memory that nobody has used."
    yield f"memory://store-{next(new)}"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "file", "s3"])
def address(request, tmp_path):
    "An address of each kind, with nothing there."
    if request.param == "s3":
        request.getfixturevalue("s3")
    return {"memory": f"memory://at-{next(new)}", "file": f"file://{tmp_path}/far", "s3": f"s3://bucket/at-{next(new)}"}[request.param]


def made(store, artifact=ONE, pause=0.0):
    "The files of an artifact, checked."
    files = machines.read(store.get(artifact, machines.make(artifact, store, pause)))
    machines.check(files, artifact)
    return files


def never(folder):
    raise AssertionError("it is there, and is not made")


class TestStore:
    def test_threads_that_ask_at_once_make_it_once(self, tmp_path):
        made = []

        def make(path):
            made.append(1)
            time.sleep(0.2)
            (path / "x").write_text("1")

        threads = [threading.Thread(target=Store(tmp_path).get, args=(Artifact("s"), make)) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(made) == 1 and (Store(tmp_path).path(Artifact("s")) / "x").read_text() == "1"
        assert sorted(os.listdir(tmp_path / "s")) == [Artifact("s").hash, f"{Artifact('s').hash}.lock"]

    def test_a_failed_stage_leaves_no_artifact(self, tmp_path):
        store = Store(tmp_path)
        with pytest.raises(ZeroDivisionError):
            store.get(Artifact("s"), lambda path: 1 / 0)
        assert not store.has(Artifact("s")) and status(store).state.tolist() == ["unfinished"]

    def test_what_a_killed_process_left_half_written_is_no_part_of_an_artifact(self, address, tmp_path):
        for store in map(open_store, (tmp_path / "near", address)):
            begun = store.root / "s" / f"{ONE.hash}.partial" / "inner"
            begun.mkdir(parents=True)
            for name in ("kept.txt", ".model.pt.0123456789ab.tmp", ".tmpyyZwA1"):
                (begun / name).touch()
            folder = store.get(ONE, lambda partial: (partial / "made.txt").touch())
            assert {p.relative_to(folder).as_posix() for p in folder.rglob("*")} == {"artifact.json", "inner", "inner/kept.txt", "made.txt"}

    def test_the_hash_does_not_depend_on_the_order_of_settings(self):
        assert Artifact("s", {"a": 1, "b": 2}).hash == Artifact("s", {"b": 2, "a": 1}).hash
        assert len({Artifact("s", {"a": v}).hash for v in (1, 2, "1", None, [1])}) == 5

    def test_no_store_is_one_line(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no artifact store"):
            status(tmp_path / "gone")


class TestAddresses:
    def test_an_artifact_is_made_by_one_and_copied_by_the_others(self, address, tmp_path):
        first, second = (RemoteStore(address, copies=tmp_path / name) for name in ("a", "b"))
        assert not first.has(ONE) and first.there([ONE]) == set() == second.there([ONE])
        files = made(first)
        assert second.has(ONE) and second.there([ONE, Artifact("s", {"n": 2})]) == {ONE.hash}
        assert second.about(ONE)["config"] == {"n": 1}
        assert machines.read(second.get(ONE, never)) == files  # artifact.json as well
        assert first.path(ONE) != second.path(ONE) and machines.read(first.get(ONE, never)) == files

    def test_what_was_copied_is_read_without_the_network(self, address, tmp_path):
        store = RemoteStore(address, copies=tmp_path / "a")
        files = made(store)

        class Gone:
            def __getattr__(self, name):
                raise AssertionError(f"asks for {name}")

        store.shelf.objects = store.objects = Gone()
        assert store.has(ONE) and machines.read(store.get(ONE, never)) == files

    def test_what_lies_there_is_what_the_chapter_says(self, address, tmp_path):
        store = RemoteStore(address, copies=tmp_path / "a")
        made(store)
        manifest = json.loads(store.objects.read(f"s/{ONE.hash}.json"))
        place = f"s/files/{ONE.hash}"
        assert store.objects.names(place) == [manifest["attempt"]] and store.objects.names("s/leases") == []
        assert set(manifest["files"]) == {*machines.SIZES, *machines.MAKER}
        assert {name: size for name, (size, _) in manifest["files"].items() if name in machines.SIZES} == machines.SIZES
        assert [name for name in store.objects.names() if name not in ("s", "store.json")] == []

    def test_status_tells_what_is_there_and_what_was_begun(self, address, tmp_path):
        store = RemoteStore(address, copies=tmp_path / "a")
        made(store)
        with pytest.raises(ZeroDivisionError):
            store.get(Artifact("s", {"n": 2}), lambda folder: 1 / 0)
        for asks in (store, RemoteStore(address, copies=tmp_path / "b")):
            found = status(asks).set_index("hash")
            assert (found.loc[ONE.hash, "state"], found.loc[ONE.hash, "MB"]) == ("done", round(sum(machines.SIZES.values()) / 1e6, 1))
        assert status(store).state.tolist().count("unfinished") == 1
        assert list(stored(store)["s"]) == [ONE.hash] and stored(store)["s"][ONE.hash] == json.loads(
            (store.path(ONE) / "artifact.json").read_text())

    def test_files_may_be_called_anything(self, address, tmp_path):
        names = ["a b.txt", "ü/ß.txt", "x#1.txt", "50%.txt", "a+b&c=d.txt", "[0]*{1}.txt", "~/.hidden"] + ["q?.txt"] * (os.name != "nt")

        def make(folder):
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)

        first = machines.read(RemoteStore(address, copies=tmp_path / "a").get(ONE, make))
        assert set(first) == {*names, "artifact.json"}
        assert machines.read(RemoteStore(address, copies=tmp_path / "b").get(ONE, never)) == first

    def test_a_copy_that_was_cleared_away_is_fetched_again(self, memory, tmp_path):
        store = RemoteStore(memory, copies=tmp_path)
        files = made(store)
        (store.path(ONE) / "artifact.json").unlink()
        assert machines.read(RemoteStore(memory, copies=tmp_path).get(ONE, never)) == files

    def test_a_folder_can_be_a_store_and_an_address_at_once(self, tmp_path):
        local, far = Store(tmp_path), RemoteStore(f"file://{tmp_path}", copies=tmp_path / "copies")
        assert made(local)[machines.MAKER[0]] != made(far)[machines.MAKER[0]]
        assert machines.read(local.get(ONE, never)) != machines.read(far.get(ONE, never))
        assert len(status(local)) == len(status(far)) == 1

    def test_an_emptied_place_is_another_store(self, memory, tmp_path):
        before = RemoteStore(memory, copies=tmp_path)
        files = made(before)
        fsspec.filesystem("memory").store.clear()
        after = RemoteStore(memory, copies=tmp_path)
        assert not after.has(ONE) and made(after) != files and before.root != after.root

    def test_a_place_is_opened_by_its_name(self, tmp_path, monkeypatch):
        monkeypatch.setenv("AIMFAIR_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        store = open_store("file://far/")
        assert store.where == f"file://{tmp_path}/far" and open_store(store) is store
        files = made(store)
        assert store.root.parent == tmp_path / "cache" / "stores" and store.has(ONE)
        assert machines.read(open_store(store.where).get(ONE, never)) == files
        assert open_store(tmp_path).where == tmp_path and open_store("~/runs").where == Path("~/runs").expanduser()

    def test_copies_that_cannot_be_kept_in_the_cache_go_elsewhere(self, memory, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.warns(DataWarning, match="cannot hold copies of a store"):
            assert made(RemoteStore(memory, copies=tmp_path / "file"))

    def test_a_manifest_cannot_name_files_elsewhere(self, memory, tmp_path):
        store, secret = RemoteStore(memory, copies=tmp_path / "a"), tmp_path / "outside"
        store.prepare()
        for name in ("../../../../outside", str(secret)):
            evil = {"attempt": "x", "files": {name: [1, "0" * 64]}, "config": {}}
            store.objects.write(f"s/{ONE.hash}.json", json.dumps(evil).encode())
            with pytest.warns(DataWarning, match="its manifest"):
                assert store.shelf.manifest(ONE) and made(RemoteStore(memory, copies=tmp_path / f"{next(new)}"))
            store.objects.remove(f"s/{ONE.hash}.json")
        assert not secret.exists()

    def test_a_store_of_another_layout_is_told(self, memory, tmp_path):
        Objects(memory).write("store.json", b'{"layout": 2, "id": "x"}')
        with pytest.raises(ValueError, match="is not that of a store which this version knows"):
            RemoteStore(memory, copies=tmp_path).has(ONE)

    def test_ten_thousand_are_looked_up_at_once(self, memory, tmp_path):
        store = RemoteStore(memory, copies=tmp_path)
        store.prepare()
        some = [Artifact("many", {"n": i}) for i in range(10_000)]
        for artifact in some[::2]:
            store.objects.fs.pipe_file(store.objects.at(f"many/{artifact.hash}.json"), b"{}")
        start = time.perf_counter()
        there = store.there(some)
        assert time.perf_counter() - start < 2 * slowness() and there == {a.hash for a in some[::2]}
        assert all(store.has(a) for a in some[::2])  # once seen, they stay: nobody asks again


    @pytest.mark.slow
    def test_endpoint_and_keys_may_come_from_variables_of_fsspec(self, s3, tmp_path):
        made(RemoteStore("s3://bucket/configured", copies=tmp_path))
        keep = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        theirs = {"FSSPEC_S3_ENDPOINT_URL": s3.url, "FSSPEC_S3_KEY": "key", "FSSPEC_S3_SECRET": "recognisableSecret"}
        done = subprocess.run([sys.executable, "-m", "aimfair.cli", "status", "--store", "s3://bucket/configured"],
                              env=keep | theirs | {"AIMFAIR_CACHE": str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == 0 and ONE.hash in done.stdout and "recognisableSecret" not in done.stdout + done.stderr, done.stderr


class TestDamage:
    @pytest.mark.parametrize("how", ["gone", "short", "other"])
    def test_a_file_that_is_not_what_it_was_is_found_and_the_artifact_made_again(self, address, tmp_path, how):
        first = RemoteStore(address, copies=tmp_path / "a")
        files = made(first)
        attempt = json.loads(first.shelf.manifest(ONE))["attempt"]
        name = f"s/files/{ONE.hash}/{attempt}/deep/er/weights"
        content = first.objects.read(name)
        first.objects.remove(name)
        if how != "gone":
            first.objects.write(name, content[:-1] + (b"" if how == "short" else bytes([content[-1] ^ 1])))
        second = RemoteStore(address, copies=tmp_path / "b")
        assert second.has(ONE)
        with pytest.warns(DataWarning, match=f"artifact s/{ONE.hash}: deep/er/weights is missing or damaged; .* made again"):
            again = made(second)
        assert again[machines.MAKER[0]] != files[machines.MAKER[0]]
        assert made(RemoteStore(address, copies=tmp_path / "c")) == again
        assert len(first.objects.names(f"s/files/{ONE.hash}")) == 1

    @pytest.mark.parametrize("content", [b"", b"{", b'{"attempt": "x"}', b"[]"])
    def test_a_torn_manifest_blocks_nobody(self, memory, tmp_path, content):
        store = RemoteStore(memory, copies=tmp_path / "a")
        store.prepare()
        store.objects.write(f"s/{ONE.hash}.json", content)
        with pytest.warns(DataWarning, match="its manifest is missing or damaged"):
            files = made(store)
        assert made(RemoteStore(memory, copies=tmp_path / "b")) == files

    def test_what_broke_on_the_way_is_copied_again(self, memory, tmp_path, monkeypatch):
        files, calls, fetch = made(RemoteStore(memory, copies=tmp_path / "a")), [], Objects.fetch

        def torn(self, name, file):
            calls.append(name)
            found = fetch(self, name, file)
            if "images" in name and calls.count(name) == 1:
                file.write_bytes(file.read_bytes()[:1000])
            return found

        monkeypatch.setattr(Objects, "fetch", torn)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert made(RemoteStore(memory, copies=tmp_path / "b")) == files


    def test_a_machine_that_cannot_copy_takes_nothing_away(self, address, tmp_path, monkeypatch):
        files, fetch = made(RemoteStore(address, copies=tmp_path / "a")), Objects.fetch

        def on_a_bad_disk(self, name, file):
            found = fetch(self, name, file)
            if "images" in name:
                file.write_bytes(file.read_bytes()[:-1] + b"?")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Objects, "fetch", on_a_bad_disk)
            with pytest.raises(OSError, match="which is right; is this disk sound"):
                made(RemoteStore(address, copies=tmp_path / "bad"))
        assert made(RemoteStore(address, copies=tmp_path / "b")) == files


def both_at_once(stores):
    "Two stores are asked for the same artifact, and both make it; the files of each."
    ready, found = threading.Barrier(2), [None, None]

    def ask(i):
        def make(folder):
            ready.wait(30)
            machines.make(ONE, stores[i])(folder)
        found[i] = machines.read(stores[i].get(ONE, make))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found


class TestTwoAtOnce:
    def test_one_wins_and_both_have_its_bytes(self, address, tmp_path, monkeypatch):
        monkeypatch.setenv("AIMFAIR_LEASE", "0")
        one, other = stores = [RemoteStore(address, copies=tmp_path / name) for name in ("a", "b")]
        one.prepare()
        found = both_at_once(stores)
        machines.check(found[0], ONE)
        assert found[0] == found[1]
        (attempt,) = one.objects.names(f"s/files/{ONE.hash}")  # the other is gone
        assert json.loads(one.shelf.manifest(ONE))["attempt"] == attempt
        assert sorted(os.listdir(one.path(ONE).parent)) == sorted(os.listdir(other.path(ONE).parent)) == [ONE.hash, f"{ONE.hash}.lock"]

    def test_with_a_lease_it_is_computed_once(self, address, tmp_path):
        one, other = (RemoteStore(address, copies=tmp_path / name) for name in ("a", "b"))
        one.prepare()
        computed, found = [], {}

        def ask(store):
            def make(folder):
                computed.append(1)
                machines.make(ONE, store, pause=0.05)(folder)
            found[store] = machines.read(store.get(ONE, make))

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AIMFAIR_LEASE", "2")
            threads = [threading.Thread(target=ask, args=(store,)) for store in (one, other)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        assert len(computed) == 1 and found[one] == found[other] and one.objects.names("s/leases") == []

    def test_an_answer_that_was_lost_is_no_defeat(self, memory, monkeypatch):
        place = Objects(memory)
        pipe = type(place.fs).pipe_file

        def unheard(self, path, value, mode="overwrite", **options):
            pipe(self, path, value, mode=mode, **options)
            raise OSError("the connection was closed")

        monkeypatch.setattr(type(place.fs), "pipe_file", unheard)
        assert place.create("a", b"ours") and not place.create("a", b"theirs")

    def test_a_writer_that_did_not_hear_does_not_remove_what_it_shared(self, memory, tmp_path, monkeypatch):
        create = Objects.create

        def unheard(self, name, content):
            create(self, name, content)
            return create(self, name, content)  # sent again, as clients do

        monkeypatch.setattr(Objects, "create", unheard)
        files = made(RemoteStore(memory, copies=tmp_path / "a"))
        assert made(RemoteStore(memory, copies=tmp_path / "b")) == files


class TestLeases:
    def left(self, memory, **said):
        "A lease whose holder has died."
        store = RemoteStore(memory, copies=None)
        store.prepare()
        store.objects.write(f"s/leases/{ONE.hash}.0", json.dumps({"holder": "dead", **said}).encode())

    def took(self, memory, tmp_path, monkeypatch, seconds="1"):
        monkeypatch.setenv("AIMFAIR_LEASE", seconds)
        start = time.monotonic()
        made(RemoteStore(memory, copies=tmp_path / f"{next(new)}"))
        return time.monotonic() - start

    def test_that_of_a_dead_holder_ends_with_its_time(self, memory, tmp_path, monkeypatch):
        self.left(memory, until=time.time() + 0.7)
        assert 0.5 < self.took(memory, tmp_path, monkeypatch, "60") < 10

    def test_one_that_is_over_holds_nobody_up(self, memory, tmp_path, monkeypatch):
        self.left(memory, until=time.time() - 1)
        assert self.took(memory, tmp_path, monkeypatch, "60") < 1

    def test_one_of_a_wrong_clock_ends_for_who_has_watched_it(self, memory, tmp_path, monkeypatch):
        self.left(memory, until=time.time() + 1e9)
        assert 0.5 < self.took(memory, tmp_path, monkeypatch, "0.6") < 10

    def test_half_of_one_ends_too(self, memory, tmp_path, monkeypatch):
        self.left(memory)
        Objects(memory).write(f"s/leases/{ONE.hash}.0", b'{"hol')
        assert self.took(memory, tmp_path, monkeypatch, "0.6") < 10

    def test_who_starts_again_need_not_wait_for_itself(self, memory, tmp_path, monkeypatch):
        monkeypatch.setenv("AIMFAIR_LEASE", "60")
        stopped = RemoteStore(memory, copies=tmp_path)
        monkeypatch.setattr(Lease, "release", lambda self: None)  # as if killed
        with pytest.raises(ZeroDivisionError):
            stopped.get(ONE, lambda folder: 1 / 0)
        monkeypatch.undo()
        assert stopped.objects.names("s/leases") == [f"{ONE.hash}.0"]
        start = time.monotonic()
        made(RemoteStore(memory, copies=tmp_path))
        assert time.monotonic() - start < 5 and stopped.objects.names("s/leases") == []

    def test_a_holder_at_work_keeps_it(self, memory):
        place = Objects(memory)
        holder, other = (Lease(place, "x", name, seconds=0.3) for name in ("holder", "other"))
        with held(holder, unless=lambda: False):
            end = time.monotonic() + 1
            while time.monotonic() < end:
                assert not other.take()
                time.sleep(0.05)
        assert other.take()

    def test_nobody_waits_for_what_is_there(self, memory):
        place = Objects(memory)
        Lease(place, "x", "holder").take()
        with held(Lease(place, "x", "other"), unless=lambda: True):
            pass
        assert place.names() == ["x.0"]

    def test_of_many_who_take_over_one_does(self, tmp_path):
        place = Objects(f"file://{tmp_path}")
        for turn in range(5):
            Lease(place, f"x{turn}", "dead", seconds=0.01).take()
            time.sleep(0.05)
            got, ready = [], threading.Barrier(8)

            def ask(i, turn=turn, got=got, ready=ready):
                ready.wait()
                got.append(Lease(place, f"x{turn}", f"{i}").take())

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            assert got.count(True) == 1

    def test_wrong_settings_are_told(self, memory, tmp_path, monkeypatch):
        monkeypatch.setenv("AIMFAIR_LEASE", "a minute")
        with pytest.raises(ValueError, match="AIMFAIR_LEASE is 'a minute'; expected seconds"):
            made(RemoteStore(memory, copies=tmp_path))


class Dead(BaseException):
    "What ends a machine. No code of the store catches it."


class Dying(Objects):
    "Files at an address for a machine that dies: before its n-th call, after it, or with half a file copied. From then on it does nothing."

    def __init__(self, address, call, when):
        super().__init__(address)
        self.calls, self.call, self.when = 0, call, when

    def write(self, name, content):
        "A lease is renewed beside all that: the dead do not."
        if self.calls >= self.call:
            raise OSError
        super().write(name, content)

    def _run(self, name, *args):
        self.calls += 1
        if self.calls > self.call or (self.calls == self.call and self.when == "before"):
            raise Dead
        if self.calls == self.call and self.when == "half" and name in ("put", "fetch"):
            self._half(name, *args)
            raise Dead
        answer = getattr(Objects, name)(self, *args)
        if self.calls == self.call:
            raise Dead
        return answer

    def _half(self, name, far, near):
        if name == "fetch":
            content = Objects(self.address).read(far) or b""
            near.write_bytes(content[:len(content) // 2])
        else:
            Objects(self.address).write(far, near.read_bytes()[:near.stat().st_size // 2])


for _name in ("read", "create", "put", "fetch", "names", "remove"):
    def _call(self, *args, _name=_name, **options):
        return self._run(_name, *args, *options.values())
    setattr(Dying, _name, _call)


def dies(address, copies, artifact, call, when):
    "A machine asks for an artifact, and dies; whether it did."
    victim = RemoteStore(address, copies=copies)
    victim.objects = Dying(address, call, when)
    victim.shelf = Shelf(victim.objects)
    try:
        victim.get(artifact, machines.make(artifact, victim))
    except Dead:
        return True
    return False


class TestDeathAtEveryStep:
    "A machine dies at each request that it makes, in turn. Whatever it leaves, the others find the artifact whole or absent, and end."

    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        monkeypatch.setenv("AIMFAIR_LEASE", "0.05")
        monkeypatch.setattr("aimfair.repro.store.at_once", lambda do, items, most=16: [do(i) for i in items])  # in one order

    @pytest.mark.parametrize("when", ["before", "after", "half"])
    def test_while_it_makes_and_shares(self, tmp_path, when):
        for call in itertools.count(1):
            address, copies = f"memory://making-{when}-{call}", tmp_path / f"{call}"
            died = dies(address, copies / "victim", ONE, call, when)
            finishes = RemoteStore(address, copies=copies / ("victim" if (call + (when == "after")) % 2 else "b"))
            if finishes.has(ONE):  # absent, or whole as it is
                made(RemoteStore(address, copies=copies / "looks"))
            files = made(finishes)
            for name in ("victim", "c"):
                assert made(RemoteStore(address, copies=copies / name)) == files
            assert not [p for p in copies.rglob("*") if p.name.endswith((".partial", ".shared"))]
            shutil.rmtree(copies)
            if not died:
                break
        assert call > 10

    @pytest.mark.parametrize("when", ["before", "after", "half"])
    def test_while_it_copies(self, tmp_path, when, memory):
        files = made(RemoteStore(memory, copies=tmp_path / "a"))
        for call in itertools.count(1):
            died = dies(memory, tmp_path / f"{call}", ONE, call, when)
            assert machines.read(RemoteStore(memory, copies=tmp_path / f"{call}").get(ONE, never)) == files
            if not died:
                break
        assert call > 8

    def test_what_is_made_but_not_shared_is_not_made_again(self, tmp_path, memory):
        calls = next(n for n in itertools.count(1) if not dies(f"{memory}-{n}", tmp_path / f"{n}", ONE, n, "before"))
        assert dies(memory, tmp_path / "victim", ONE, calls - 4, "before")  # at one of the last files
        again = RemoteStore(memory, copies=tmp_path / "victim")
        assert not again.has(ONE)
        machines.check(machines.read(again.get(ONE, never)), ONE)
        assert len(again.objects.names(f"s/files/{ONE.hash}")) == 1


class Cluster(RuleBasedStateMachine):
    "Machines that come, ask, die and lose their disks, over a place where files vanish and rot."
    artifacts = machines.artifacts(0, n=2)

    @initialize()
    def begin(self):
        self.address, self.stack = f"memory://cluster-{next(new)}", ExitStack()
        self.copies = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.stack.enter_context(pytest.MonkeyPatch.context()).setenv("AIMFAIR_LEASE", "0.02")
        self.stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", DataWarning)

    @rule(machine=st.integers(0, 2), artifact=st.sampled_from(artifacts))
    def ask(self, machine, artifact):
        store = RemoteStore(self.address, copies=self.copies / str(machine))
        made(store, artifact)
        assert store.has(artifact) and store.there(self.artifacts) >= {artifact.hash}

    @rule(machine=st.integers(0, 2), artifact=st.sampled_from(artifacts), call=st.integers(1, 40),
          when=st.sampled_from(["before", "after", "half"]))
    def die(self, machine, artifact, call, when):
        dies(self.address, self.copies / str(machine), artifact, call, when)

    @rule(machine=st.integers(0, 2))
    def lose_the_disk(self, machine):
        shutil.rmtree(self.copies / str(machine), ignore_errors=True)

    @rule(data=st.data(), how=st.sampled_from(["gone", "flipped", "cut"]))
    def rot(self, data, how):
        fs = fsspec.filesystem("memory")
        files = [name for name in fs.find(self.address.removeprefix("memory:/")) if not name.endswith("store.json")]
        if files:
            name = data.draw(st.sampled_from(sorted(files)))
            content = fs.cat_file(name)
            fs.rm_file(name)
            if how != "gone":
                fs.pipe_file(name, content[:-1] if how == "cut" else content[:-1] + bytes(b ^ 1 for b in content[-1:]))

    def teardown(self):
        if hasattr(self, "stack"):
            for machine, artifact in itertools.product(range(4), self.artifacts):
                made(RemoteStore(self.address, copies=self.copies / str(machine)), artifact)
            self.stack.close()
            fsspec.filesystem("memory").store.clear()


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)


@pytest.fixture(scope="module")
def forks():
    "Processes that have imported what they need."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["store_machines"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
        first = context.Process(target=machines.artifacts, args=(0,))
        first.start()
    first.join()
    return context


def files_there(where, copies, server):
    "{hash: {name: bytes}} of all artifacts in a store, read without it."
    if copies is None:
        return {p.parent.name: machines.read(p.parent) for p in Path(where).glob("*/*/artifact.json")}
    if where.startswith("s3"):
        everything = server.files(where.removeprefix("s3://bucket/") + "/")
    else:
        everything = machines.read(where.removeprefix("file://"))
    found = {}
    for name in everything:
        stage, _, file = name.partition("/")
        if file.endswith(".json") and "/" not in file:
            manifest = json.loads(everything[name])
            place = f"{stage}/files/{file.removesuffix('.json')}/{manifest['attempt']}/"
            about = {k: v for k, v in manifest.items() if k not in ("attempt", "files")}
            found[file.removesuffix(".json")] = {n: everything[place + n] for n in manifest["files"]} | {
                "artifact.json": (json.dumps(about, indent=1, sort_keys=True) + "\n").encode()}
    return found


def told(capfd, *words):
    "The one line on standard error of a command that is refused."
    assert main(list(map(str, words))) == 2
    shown = capfd.readouterr()
    (line,) = shown.err.strip().splitlines()
    assert line.startswith("aimfair: ") and "ecognisable" not in shown.err + shown.out
    return line


class TestErrors:
    @pytest.mark.parametrize("place, words", [
        ("s3://nobucket/runs", "s3://nobucket/runs: The specified bucket does not exist"),
        ("s3://bucket/nothing", "no artifact store at s3://bucket/nothing; `aimfair reproduce` makes one"),
        ("s3://KEY:Recognisable@bucket/runs", "s3://...@bucket/runs: an address is written into notes, so no password"),
        ("s3://KEY:Recog/Recognisable@bucket/runs", "no password and no token"),
        ("https://host/runs?token=Recognisable", "https://host/runs?...: an address is written"),
        ("s4://bucket/runs", "no protocol 's4'; did you mean s3"),
        ("s3://", "names no bucket"),
        ("s3://No Bucket!/runs", "Invalid bucket name"),
        ("zip::s3://bucket/runs", "one file system"),
    ])
    def test_wrong_addresses_are_told_in_a_line(self, s3, capfd, place, words):
        assert words in told(capfd, "status", "--store", place)

    @pytest.mark.parametrize("change, words", [
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials (Unable to locate credentials); set AWS_ACCESS_KEY"),
        ({"AWS_PROFILE": "nobody"}, "no credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "no connection (s3://bucket/runs cannot be reached"),
        ({"AWS_ENDPOINT_URL": "http://me:Recognisable@127.0.0.1:9"}, "no connection (s3://bucket/runs cannot be reached"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, "s3://bucket/runs: Invalid endpoint"),
    ])
    def test_what_lacks_in_the_environment_is_told_in_a_line(self, s3, capfd, tmp_path, change, words):
        files = dict.fromkeys(("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"), str(tmp_path / "none"))
        with in_environment({**files, "AWS_MAX_ATTEMPTS": "1", **change}):
            assert words in told(capfd, "status", "--store", "s3://bucket/runs")

    def test_a_missing_package_is_named(self, capfd, monkeypatch):
        for protocol, module, words in (("s3", "s3fs", "'aimfair[s3]'"), ("gs", "gcsfs", "gcsfs")):
            monkeypatch.setitem(sys.modules, module, None)
            monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
            line = told(capfd, "status", "--store", f"{protocol}://bucket/runs")
            assert line.endswith(f"needs the package {module}: pip install {words}")

    @pytest.mark.parametrize("place, words", [
        ("file://{}/file/runs", "file/runs"), ("{}/file", "is a file; expected a folder, or an address"),
        ("s3://nobucket/x", "bucket does not exist"),
        ("memory://runs", "known to this process alone"), ("https://127.0.0.1:9/runs", "no connection"),
    ])
    def test_what_cannot_be_written_is_told_before_anything_is_computed(self, s3, capfd, tmp_path, place, words):
        (tmp_path / "file").write_text("in the way")
        line = told(capfd, "reproduce", "--only", "layer_sensitivity", "--seeds", "1", "--out", tmp_path / "out", "--store",
                    place.format(tmp_path))
        assert words in line

    def test_who_may_not_write_is_told(self, memory, tmp_path, monkeypatch):
        def denied(*_, **__):
            raise PermissionError("Access Denied")

        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", denied)
        with pytest.raises(PermissionError, match=f"{memory}: not allowed .Access Denied.; check the credentials"):
            RemoteStore(memory, copies=tmp_path).prepare()

    def test_an_address_that_has_become_a_path_is_told(self):
        with pytest.raises(ValueError, match="two slashes behind the colon"):
            open_store(Path("s3://bucket/runs"))

    def test_the_doctor_names_a_store_that_cannot_be_read(self, s3, capfd):
        assert main(["doctor", "--profile", "toy", "--store", "s3://nobucket/runs"]) == 1
        assert "missing store             s3://nobucket/runs: The specified bucket does not exist" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_ten_thousand_are_planned_by_one_listing_of_a_stage(kind, tmp_path, s3):
    "Half of them are there. What was seen there is not asked for again."
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    some = [Artifact("many", {"n": i}) for i in range(10_000)]
    address = {"file": f"file://{tmp_path}/far", "s3": "s3://bucket/many"}[kind]
    RemoteStore(address, copies=tmp_path / "a").prepare()
    for artifact in some[::2]:
        if kind == "s3":
            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object("bucket", f"many/many/{artifact.hash}.json", b"{}")
        else:
            (tmp_path / "far" / "many").mkdir(exist_ok=True)
            (tmp_path / "far" / "many" / f"{artifact.hash}.json").write_bytes(b"{}")
    took, before = [], len(s3.requests)
    for i in range(3):  # other work on the machine can only lengthen it
        store = RemoteStore(address, copies=tmp_path / f"{i}")
        start = time.perf_counter()
        assert store.there(some) == {a.hash for a in some[::2]} and store.has(some[0])
        took.append(time.perf_counter() - start)
    print(f"{kind}: {min(took):.2f} s, {len(s3.requests) - before} requests for three plans")
    if kind == "s3":
        assert len(s3.requests) - before == 3 * (1 + 5)  # store.json, and pages of a thousand: how fast they come is the server's business
    else:
        assert min(took) < 2


@pytest.mark.slow
def test_a_reproduction_on_s3_is_that_of_a_folder(s3, tmp_path, monkeypatch, capfd):
    "Two machines and two workers: the tables are those of a local store, byte by byte, and the second machine computes nothing."
    asked = ["reproduce", "--profile", Path(__file__).with_name("tiny.toml"), "--only", "layer_sensitivity", "--seeds", 1]
    place = f"s3://bucket/reproduced-{next(new)}"

    def reproduce(*more, cache=tmp_path / "none"):
        with in_environment({"AIMFAIR_CACHE": str(cache)}):
            assert main([str(word) for word in (*asked, *more)]) == 0
        return capfd.readouterr().err

    reproduce("--store", tmp_path / "runs", "--out", tmp_path / "local")
    reproduce("--store", place, "--out", tmp_path / "first", "--workers", 2, cache=tmp_path / "a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "nothing to compute" in reproduce("--store", place, cache=tmp_path / "b")
    out = tmp_path / "here" / "runs" / "results" / "tiny"
    tables = [{p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".md", ".tex")}
              for folder in (tmp_path / "local", tmp_path / "first", out)]
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) >= 3
    with in_environment({"AIMFAIR_CACHE": str(tmp_path / "c")}):  # a third machine looks at it
        assert json.loads((out / "reproduction.json").read_text())["layer_sensitivity"]["store"] == place
        seen = of_reproduction(out)
        assert len(seen.predictions(next(iter(seen.sets)))) and seen.sensitivity() is not None
        assert main(["status", "--store", place]) == 0 and "predictions" in capfd.readouterr().out
    for folder in (tmp_path / "first", out, tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        for name, content in machines.read(folder).items():
            assert b"recognisableSecret" not in content, name
    sums = [{a.parent.name: {n: c for n, c in machines.read(a.parent).items() if n != "artifact.json"}
             for a in folder.glob("stores/*/*/*/artifact.json")} for folder in (tmp_path / "a", tmp_path / "b")]
    assert sums[1] and all(sums[0][h] == files for h, files in sums[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "file", "s3"])
def test_processes_killed_at_any_moment(kind, forks, tmp_path, request):
    "Machines make, share and copy; one is killed at a random moment. Those that go on, or come after it, end with the right bytes."
    server = request.getfixturevalue("s3") if kind == "s3" else None
    home = {"folder": f"{tmp_path}/runs", "file": f"file://{tmp_path}/far", "s3": f"s3://bucket/kills-{next(new)}"}[kind]
    environment = {"AIMFAIR_LEASE": "1", **(server.environment if server else {})}
    chance, killed, usual = random.Random(KILLS), 0, 1.0

    def start(name, turn, pause=0.005):
        copies = None if kind == "folder" else str(tmp_path / "copies" / name)
        process = forks.Process(target=machines.work, args=(f"{home}/{turn}", copies, turn, chance.random(), pause, environment))
        process.start()
        return process

    def kill(process):
        "Kill a process that runs; whether it did."
        if process.is_alive():
            process.kill()
        process.join()
        return process.exitcode != 0

    def ends(process):
        process.join(120)
        assert process.exitcode == 0, "blocked" if process.exitcode is None else process.exitcode

    def check(turn):
        found = files_there(f"{home}/{turn}", None if kind == "folder" else "copies", server)
        there = {a.hash: a for a in machines.artifacts(turn)}
        for h in found.keys() & there.keys():
            machines.check(found[h], there[h])
        return {h: found[h] for h in found.keys() & there.keys()}

    for turn in range(10 * KILLS):
        shutil.rmtree(tmp_path / "copies", ignore_errors=True)
        victim, other = start("a", turn), start(chance.choice("ab"), turn)  # another machine, or the same
        time.sleep(chance.uniform(0, 1.2 * usual))
        killed += kill(victim)
        check(turn)  # whole or absent
        began = time.monotonic()
        after = start(chance.choice("ac"), turn)  # the same machine again, or a new one
        ends(other)
        ends(after)
        usual = 0.8 * usual + 0.2 * (time.monotonic() - began)
        found = check(turn)
        assert len(found) == 9
        if kind != "folder":  # another machine copies all of it, and is killed on the way; nothing is made again
            late = start("late", turn, pause=9)
            time.sleep(chance.uniform(0, 0.5 * usual))
            killed += kill(late)
            ends(start("late", turn, pause=9))
            for copy in (tmp_path / "copies").glob("*/*/*/*/artifact.json"):
                assert ".shared" in str(copy) or machines.read(copy.parent) == found[copy.parent.name], copy
        if killed >= KILLS:
            break
        Objects(f"file://{home}" if kind == "folder" else home).remove(str(turn), folder=True)  # room for the next
    print(f"{kind}: {killed} killed in {turn + 1} turns")
    assert killed >= KILLS
