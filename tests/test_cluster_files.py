"The files that people start with on a cluster: linted, held against schemas, and the job for Slurm run with Ray on this machine."

import configparser
import getpass
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "nbs/site/how_to/cluster"
PAGE = FILES.with_suffix(".md")
NAMES = ["Dockerfile", "Dockerfile.dockerignore", "rayjob.yaml", "slurm.sh"]
MARK = re.compile(r"^(?P<value>.*\S)\s{2,}# FILL IN: (?P<what>\S.*)$")


def text(name):
    return (FILES / name).read_text(encoding="utf-8")


def settings():
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def pinned(package):
    "The version in constraints.txt on a new Python; of what it does not name, the one that is installed."
    line = re.search(rf"^{package}==([\w.]+)(?!.*python_version <)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M | re.I)
    return line[1] if line else importlib.metadata.version(package)


def tool(name):
    "A program that a package brings, in this environment or on the PATH."
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    return found


def says(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


# all of them

def test_all_are_on_the_page_and_can_be_downloaded():
    page = PAGE.read_text(encoding="utf-8")
    assert sorted(path.name for path in FILES.iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert f"{{download}}`{name} <cluster/{name}>`" in page, name
        assert f"{{literalinclude}} cluster/{name}\n" in page, name


@pytest.mark.parametrize(("name", "at_least"), [("rayjob.yaml", 6), ("slurm.sh", 12)])
def test_what_has_to_be_filled_in_is_marked_in_one_way(name, at_least):
    lines = [line for line in text(name).splitlines() if "FILL IN" in line and "grep" not in line]
    assert len(lines) >= at_least and all(MARK.match(line) for line in lines), lines
    for line in text(name).splitlines():  # what no machine has
        if not line.startswith("#") and re.search(r"BUCKET|example\.org|claimName|=/shared/", line):
            assert MARK.match(line), line


def versions_named():
    "{where: (version named, version of this repository)}"
    docker, rayjob = text("Dockerfile"), yaml.safe_load(text("rayjob.yaml"))
    python = re.search(r"tested with: Python ([\d.]+\d)", (ROOT / "constraints.txt").read_text(encoding="utf-8"))[1]
    own, images = settings()["version"], [c["image"] for template in pod_templates().values() for c in template["spec"]["containers"]]
    yield "Python", re.findall(r"python:([\d.]+)-", docker), python
    yield "label of the image", re.findall(r'image\.version="(.+?)"', docker), own
    yield "tag in the Dockerfile", re.findall(r"/aimfair:(\S+)", docker), own
    yield "tag in rayjob.yaml", [image.rsplit(":", 1)[1] for image in images], own
    yield "tags on the page", re.findall(r"/aimfair:([\d.]+\d)", PAGE.read_text(encoding="utf-8")), own
    yield "Ray", [rayjob["spec"]["rayClusterSpec"]["rayVersion"]], pinned("ray")
    yield "PyTorch on the page", re.findall(r"PyTorch ([\d.]+\d)", PAGE.read_text(encoding="utf-8")), pinned("torch")


def test_versions_are_those_of_this_repository():
    for where, named, ours in versions_named():
        assert named and set(named) == {ours}, (where, named, ours)


def test_cuda_on_the_page_is_that_of_pytorch():
    page = re.findall(r"CUDA ([\d.]+\d)", PAGE.read_text(encoding="utf-8"))
    needs = " ".join(importlib.metadata.requires("torch") or [])
    found = re.search(r"cuda-toolkit\[.*?\]==(\d+\.\d+)", needs)
    if found is None or not importlib.metadata.version("torch").startswith(pinned("torch")):
        pytest.skip("another PyTorch, or one without CUDA")
    assert page and set(page) == {found[1]}


def commands():
    "Every `aimfair reproduce` of the files, as words."
    script = text("slurm.sh").replace("\\\n", " ")
    yield shlex.split(yaml.safe_load(text("rayjob.yaml"))["spec"]["entrypoint"])
    yield shlex.split(re.search(r"^aimfair reproduce .*?(?= &$)", script, re.M)[0])


def test_commands_have_options_that_there_are():
    from typer.main import get_command

    from aimfair.cli import app

    known = {name for parameter in get_command(app).commands["reproduce"].params for name in parameter.opts}
    for words in commands():
        assert words[:4] == ["aimfair", "reproduce", "--profile", "paper"]
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options >= {"--on", "--store", "--out"} and options <= known, options - known


# Dockerfile

def test_dockerfile_passes_hadolint():
    code, said = says(tool("hadolint"), "--no-color", FILES / "Dockerfile")
    assert (code, said.strip()) == (0, "")


def test_image_has_extras_that_there_are_and_no_root():
    docker = text("Dockerfile")
    extras = re.search(r"/source\[([\w,]+)\]", docker)[1].split(",")
    assert set(extras) >= {"ray", "s3", "hub"}
    assert not [extra for extra in extras if f"{extra}_requirements" not in settings()]
    user = int(re.search(r"^USER (\d+)", docker, re.M)[1])
    assert user == int(re.search(r"useradd .*--uid (\d+)", docker)[1]) > 0
    assert {template["spec"]["securityContext"]["runAsUser"] for template in pod_templates().values()} == {user}


def let_through():
    "Files of the repository that go to the builder, as Docker reads a .dockerignore: the last rule that fits decides."
    rules = [line for line in text("Dockerfile.dockerignore").splitlines() if line and not line.startswith("#")]

    def fits(rule, path):
        places = [path, *path.parents]
        if rule.startswith("**/"):
            return any(fnmatch(place.name, rule[3:]) for place in places)
        return any(len(place.parts) == len(Path(rule).parts) and fnmatch(place.as_posix(), rule) for place in places)

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    for name in filter(None, tracked):
        decides = [rule for rule in rules if fits(rule.removeprefix("!"), Path(name))]
        if decides and decides[-1].startswith("!"):
            yield name


@pytest.mark.slow
def test_builder_gets_all_that_the_package_is_made_of(tmp_path):
    sent = list(let_through())
    if not sent:
        pytest.skip("not a git checkout")
    assert "constraints.txt" in sent and not [name for name in sent if name.startswith(("tests/", "figures/", "nbs/site"))]
    for name in sent:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    code, said = says(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path,
                      tmp_path / "source")
    assert code == 0, said
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        made = {name for name in wheel.namelist() if ".dist-info/" not in name}
    tracked = {name for name in subprocess.check_output(["git", "ls-files", "aimfair"], cwd=ROOT, text=True).split("\n") if name}
    notebooks = {f"aimfair/assets/experiments/{path.name}" for path in (ROOT / "nbs/experiments").glob("*.ipynb")}
    assert made == tracked | notebooks


# rayjob.yaml

def pod_templates():
    "{name: template} of all Pods of the RayJob."
    spec = yaml.safe_load(text("rayjob.yaml"))["spec"]
    cluster = spec["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"], **workers}


def closed(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# what KubeRay's reference of ray.io/v1 says of the fields that are used here; Pod templates are looked at below
POD, COUNT, FLAG, WORD = {"type": "object"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"type": "string", "minLength": 1}
PARAMETERS = {"type": "object", "additionalProperties": WORD}  # of `ray start`: all are words
WORKERS = closed(["groupName", "rayStartParams", "template", "minReplicas", "maxReplicas"], groupName=WORD, rayStartParams=PARAMETERS,
                 template=POD, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT)
CLUSTER = closed(
    ["headGroupSpec"], rayVersion=WORD, authOptions=closed(["mode"], mode={"enum": ["token", "disabled"]}), enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(idleTimeoutSeconds=COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, resources=POD,
                             securityContext=POD),
    headGroupSpec=closed(["rayStartParams", "template"], rayStartParams=PARAMETERS, template=POD),
    workerGroupSpecs={"type": "array", "items": WORKERS, "minItems": 1},
)
RAYJOB = closed(
    ["apiVersion", "kind", "metadata", "spec"], apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"}, metadata=POD,
    spec=closed(["entrypoint", "rayClusterSpec"], entrypoint=WORD, backoffLimit=COUNT, activeDeadlineSeconds=COUNT,
                shutdownAfterJobFinishes=FLAG, ttlSecondsAfterFinished=COUNT, submitterPodTemplate=POD, rayClusterSpec=CLUSTER),
)


def test_rayjob_passes_yamllint():
    linter = pytest.importorskip("yamllint.linter")
    config = pytest.importorskip("yamllint.config").YamlLintConfig("{extends: default, rules: {line-length: {max: 140}}}")
    assert not list(linter.run(text("rayjob.yaml"), config))


def test_rayjob_has_the_fields_of_a_rayjob():
    job = yaml.safe_load(text("rayjob.yaml"))
    jsonschema.validate(job, RAYJOB)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0  # a number, as one writes it easily
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAYJOB)


def valid_pod(template):
    "Hold a template against the schema of Kubernetes, in which no field is unknown."
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    kubernetes_validate.validate(whole, desired_version=kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ["submitter", "head", "gpu"])
def test_pods_are_valid_to_kubernetes(name):
    template = pod_templates()[name]
    valid_pod(template)
    template["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(jsonschema.ValidationError):
        valid_pod(template)


def test_head_and_workers_see_the_same_and_secrets_are_not_written_down():
    head, worker = (pod_templates()[name]["spec"] for name in ("head", "gpu"))
    assert head["volumes"] == worker["volumes"]
    for part in ("image", "env", "volumeMounts"):
        assert head["containers"][0][part] == worker["containers"][0][part]
    names = {variable["name"]: variable for variable in head["containers"][0]["env"]}
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} <= set(names)
    for name, variable in names.items():
        if re.search("KEY|TOKEN|SECRET", name):
            assert set(variable["valueFrom"]["secretKeyRef"]) >= {"name", "key"} and "value" not in variable
    mounted = {mount["name"]: mount["mountPath"] for mount in worker["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in worker["volumes"]}
    assert mounted["shm"] == "/dev/shm" and volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert names["AIMFAIR_CACHE"]["value"] == mounted["cache"] and "emptyDir" in volumes["cache"]  # of this Pod alone
    shared = [names[name]["value"] for name in ("AIMFAIR_CELEBA", "AIMFAIR_UTKFACE", "HF_HOME", "TORCH_HOME")]
    out = next(iter(commands()))[-1]  # what the head writes outlives it
    assert all(path.startswith(mounted["shared"] + "/") for path in [*shared, out])


def test_gpus_are_asked_for_by_workers_alone():
    cluster = yaml.safe_load(text("rayjob.yaml"))["spec"]["rayClusterSpec"]
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1" and "nvidia.com/gpu" not in str(head)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] and cluster["enableInTreeAutoscaling"]
    assert any(toleration["key"] == "nvidia.com/gpu" for toleration in group["template"]["spec"]["tolerations"])


# slurm.sh

def test_script_passes_shellcheck_and_bash():
    code, said = says(tool("shellcheck"), "--color=never", FILES / "slurm.sh")
    assert (code, said) == (0, "")
    assert says("bash", "-n", FILES / "slurm.sh") == (0, "")


def test_script_asks_slurm_for_a_second_chance():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text("slurm.sh"), re.M))
    assert {"requeue", "no-kill", "nodes", "gpus-per-node", "cpus-per-task", "mem", "time"} <= set(options)
    name, seconds = options["signal"].removeprefix("B:").split("@")
    assert options["ntasks-per-node"] == "1" and options["open-mode"] == "append" and int(seconds) >= 60
    assert re.search(rf"^trap \w+ {name}$", text("slurm.sh"), re.M)


def filled_in(target, **values):
    "Write the script as a person fills it in: by the marks. A value of None takes the line away."
    lines, left = [], dict(values)
    for line in text("slurm.sh").splitlines():
        found = MARK.match(line)
        name = found and re.match(r"(?:#SBATCH --|export )?([\w-]+)=", found["value"])[1].replace("-", "_")
        if name in left:
            value = left.pop(name)
            line = None if value is None else found["value"].split("=")[0] + f"={value}"
        lines += [] if line is None else [line]
    assert not left, left
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


AIMFAIR = '''\
"Stands in for the command: works on every node of Ray, waits where it was told to, and notes in the store what it was asked."
import json, os, sys, time
from pathlib import Path

import ray

words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
store, told = Path(words["--store"]), json.loads(Path(__file__).with_name("told.json").read_text())
ray.init(words["--on"].removeprefix("ray="), log_to_driver=False)


@ray.remote(num_cpus=2)
def node():
    time.sleep(2)
    return ray.get_runtime_context().get_node_id()


seen = {tuple(ray.get([node.remote(), node.remote()])) for _ in range(2)}
store.mkdir(parents=True, exist_ok=True)
number = len(list(store.iterdir()))
about = {"words": words, "nodes": len({n for pair in seen for n in pair}), "folder": os.environ["AIMFAIR_CELEBA"],
         "token": os.environ["RAY_AUTH_TOKEN"], "mode": os.environ["RAY_AUTH_MODE"]}
(store / f"new-{number}").write_text(json.dumps(about))
(store / f"new-{number}").rename(store / f"{number}.json")
time.sleep(told["seconds"][number])
sys.exit(told["exit"])
'''

SRUN = '''\
"Stands in for Slurm's: starts the command on this machine, and ends all of it when it is told to end."
import os, signal, subprocess, sys, time

options = [word for word in sys.argv[1:] if word.startswith("--")][:5]
command = sys.argv[1 + len(options):]
child = subprocess.Popen(command, start_new_session=True)


def end(*_):
    for sign in [signal.SIGTERM] + [0] * 200 + [signal.SIGKILL]:
        try:
            os.killpg(child.pid, sign)
        except ProcessLookupError:
            break
        child.poll()
        time.sleep(0.1)
    sys.exit(143)


signal.signal(signal.SIGTERM, end)
sys.exit(child.wait() & 255)
'''

SCONTROL = '''\
import sys
from pathlib import Path

if sys.argv[1:3] == ["show", "hostnames"]:
    print(*sys.argv[3].split(","), sep="\\n")
else:
    with open(Path(__file__).with_name("calls"), "a") as calls:
        print(*sys.argv[1:], file=calls)
'''


def program(file, source):
    file.write_text(f"#!{sys.executable}\n{source}", encoding="utf-8")
    file.chmod(0o755)


class Job(NamedTuple):
    folder: Path  # of store, results and logs
    script: Path  # filled in
    programs: Path  # folder of the environment's programs
    tell: Callable  # the command, how long it takes and how it ends
    start: Callable  # the script, without Slurm


@pytest.fixture
def job(tmp_path):
    pytest.importorskip("ray")
    programs = tmp_path / "environment/bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'export PATH={programs}:{sysconfig.get_path("scripts")}:$PATH\n', encoding="utf-8")
    program(programs / "aimfair", AIMFAIR)
    script = filled_in(tmp_path / "slurm.sh", environment=programs.parent, store=tmp_path / "store", out=tmp_path / "out",
                       gpus_per_node=None, cpus_per_task=2, mem="1G", AIMFAIR_CELEBA=tmp_path / "celeba")

    def tell(seconds=(0,), exit=0):
        (programs / "told.json").write_text(json.dumps({"seconds": seconds, "exit": exit}), encoding="utf-8")

    def start(number, nodes="n1,n2", **environment):
        "Run the script as Slurm would, on nodes that are this machine."
        for name, source in (("srun", SRUN), ("scontrol", SCONTROL)):
            program(programs / name, source)
        ours = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": nodes, "SLURM_CPUS_PER_TASK": "2", **environment}
        with open(tmp_path / "job.log", "a") as log:
            started.append(subprocess.Popen(["bash", script], cwd=tmp_path, env={**os.environ, **ours}, stdout=log, stderr=log))
        return started[-1]

    tell()
    started = []
    yield Job(tmp_path, script, programs, tell, start)
    for process in started:
        process.terminate()
        process.wait(timeout=90)


def noted(folder, number=0, within=300):
    "What the command has noted when it was started for the n-th time."
    file, end = folder / "store" / f"{number}.json", time.monotonic() + within
    while not file.exists():
        assert time.monotonic() < end, [log.read_text(encoding="utf-8")[-3000:] for log in folder.glob("*.log")]
        time.sleep(0.2)
    return json.loads(file.read_text(encoding="utf-8"))


def left_over(number):
    "Processes and files of a job's Ray."
    folder, found = Path(f"/tmp/ray-{number}"), []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"{folder}/".encode() in (place / "cmdline").read_bytes():
                found.append(place.name)
        except OSError:
            continue
    return found + ([folder] if folder.exists() else [])


def gone(number, within=30):
    "Whether nothing is left over, at the latest after some seconds."
    end = time.monotonic() + within
    while left_over(number) and time.monotonic() < end:
        time.sleep(0.2)
    return not left_over(number)


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")


@pytest.mark.slow
@needs_proc
def test_script_tells_of_a_failure_and_keeps_the_logs_of_ray(job):
    number = os.getpid() * 10 + 2
    job.tell(exit=3)
    assert job.start(number, nodes="n1").wait(timeout=400) == 3
    assert list(job.folder.glob(f"ray-{number}/n1/gcs_server*")) and gone(number)
    assert not (job.programs / "calls").exists()  # a mistake is not made again and again


@pytest.mark.slow
@needs_proc
def test_script_runs_the_command_on_all_nodes_goes_back_into_the_queue_and_on(job):
    folder, number = job.folder, os.getpid() * 10 + 1
    job.tell(seconds=[600, 0])
    process = job.start(number)
    first = noted(folder)
    host, port = first["words"].pop("--on").removeprefix("ray=").rsplit(":", 1)
    assert first["words"] == {"--profile": "paper", "--store": str(folder / "store"), "--out": str(folder / "out")}
    assert first["nodes"] == 2 and first["folder"] == str(folder / "celeba")
    assert first["mode"] == "token" and len(first["token"]) >= 32 and 1024 < int(port) < 32768 and host
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert (job.programs / "calls").read_text(encoding="utf-8") == f"requeue {number}\n" and gone(number)
    assert job.start(number, SLURM_RESTART_COUNT="1").wait(timeout=400) == 0
    second = noted(folder, 1)
    assert second["nodes"] == 2 and second["token"] != first["token"] and gone(number) and not list(folder.glob("ray-*"))
    assert "begun 1 times before" in (folder / "job.log").read_text(encoding="utf-8")


@pytest.mark.slow
@needs_proc
def test_script_ends_at_once_where_ray_does_not_start(job):
    number, began = os.getpid() * 10 + 3, time.monotonic()
    program(job.programs / "ray", "import sys\nsys.exit('no Ray here')\n")
    assert job.start(number).wait(timeout=120) == 1
    said = (job.folder / "job.log").read_text(encoding="utf-8")
    assert said.count("no Ray here") == 3 and "a node of Ray did not start" in said and time.monotonic() - began < 90
    assert gone(number) and not (job.folder / "store").exists()


# the same with Slurm itself, where it is installed

CONF = '''\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.txt
SlurmdLogFile={folder}/slurmd-%n.txt
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=2000
PartitionName=gpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
'''


@pytest.fixture
def slurm(tmp_path):
    "A cluster of two nodes that are this machine: a function that runs Slurm's commands."
    needed = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("munged", "slurmctld", "slurmd", "sbatch")]
    if None in needed:
        pytest.skip("no Slurm here")
    for name in ("munge", "state", "spool-n1", "spool-n2"):
        (tmp_path / name).mkdir()
    tmp_path.chmod(0o755)
    (tmp_path / "munge").chmod(0o711)
    (tmp_path / "key").write_bytes(os.urandom(128))
    (tmp_path / "key").chmod(0o400)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    port, port1, port2 = (s.getsockname()[1] for s in sockets)
    conf = CONF.format(host=socket.gethostname(), user=getpass.getuser(), folder=tmp_path, port=port, port1=port1, port2=port2)
    (tmp_path / "slurm.conf").write_text(conf, encoding="utf-8")
    for s in sockets:
        s.close()
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    munged, slurmctld, slurmd, _ = needed
    files = {option: tmp_path / "munge" / option for option in ("socket", "pid-file", "log-file", "seed-file")}
    running = [
        [munged, "--foreground", "--force", f"--key-file={tmp_path}/key", *(f"--{option}={file}" for option, file in files.items())],
        [slurmctld, "-D", "-c"], [slurmd, "-D", "-N", "n1"], [slurmd, "-D", "-N", "n2"],
    ]
    processes = []
    for command in running:
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(1)

    def slurm_says(*words):
        return subprocess.check_output([str(word) for word in words], cwd=tmp_path, env=environment, text=True)

    end = time.monotonic() + 60
    while slurm_says("sinfo", "--noheader", "--states=idle", "--format=%D").strip() != "2":
        assert time.monotonic() < end, (tmp_path / "slurmctld.txt").read_text(encoding="utf-8")[-2000:]
        time.sleep(0.5)
    yield slurm_says
    slurm_says("scancel", "--user", getpass.getuser())
    for process in reversed(processes):
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
@needs_proc
def test_slurm_itself_runs_the_script_and_takes_it_back(job, slurm):
    folder = job.folder
    job.tell(seconds=[600, 0])
    number = slurm("sbatch", "--parsable", job.script).strip()

    def until(state):
        end = time.monotonic() + 300
        while (found := re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", number))[1]) != state:
            assert time.monotonic() < end and found != "FAILED", (folder / f"aimfair-{number}.log").read_text(encoding="utf-8")[-3000:]
            time.sleep(0.5)

    assert noted(folder)["nodes"] == 2
    slurm("scancel", "--signal=USR1", "--batch", number)
    until("PENDING")
    assert gone(number)
    slurm("scontrol", "update", f"JobId={number}", "StartTime=now")
    until("COMPLETED")
    assert noted(folder, 1)["nodes"] == 2 and gone(number)
    assert "begun 1 times before" in (folder / f"aimfair-{number}.log").read_text(encoding="utf-8")
