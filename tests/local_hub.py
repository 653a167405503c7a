"A hub on this machine: as much of the Hugging Face hub's HTTP interface as sending a folder needs. It keeps what it gets."
import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml
from serving import serve

TOKEN = "hf_recognisableWriteToken0123456789"
READER = "hf_recognisableReadToken0123456789"
BRANCH = r"/api/(model|dataset)s/([^/]+/[^/]+)/branch/(.+)"
COMMIT = r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/(.+)"
PREUPLOAD = r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/(.+)"
BATCH = r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch"
INFO = r"/api/(model|dataset)s/([^/]+/[^/]+?)(?:/revision/(.+))?"


class LocalHub(ThreadingHTTPServer):
    """Repositories in memory: {(type, name): {revision: {path: bytes}}}, and large files by their SHA-256.

    TOKEN may write, READER may not. slow: seconds that a large file takes; fault: (status, message) that making a repository gets."""
    daemon_threads = True

    def __init__(self, slow=0.0, fault=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private, self.large, self.commits, self.requests = {}, {}, {}, [], []
        self.slow, self.fault, self.lock = slow, fault, threading.Lock()
        serve(self)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name, kind="model", revision="main"):
        return self.repositories[kind, name][revision]

    def handle_error(self, request, client_address):
        "A client that was killed is part of the test."


def blob(data):
    "Git's name of a small file."
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, body=None, **headers):
        body = json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def content(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def may(self):
        "Whether the token may write; else the answer is sent."
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token != TOKEN:
            words = {"error": f"You don't have the rights to write, {token}" if token == READER else "Invalid username or password."}
            self.send(403 if token == READER else 401, words)
        return token == TOKEN

    def do_GET(self):
        self.server.requests.append(("GET", self.path))
        if (found := re.fullmatch(INFO, self.path)) and found.groups()[:2] in self.server.repositories:
            return self.send(200, {"id": found[2], "sha": "0" * 40, "siblings": [], "tags": [], "private": False})
        self.send(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})

    def do_PUT(self):
        s, oid = self.server, self.path.rpartition("/")[2]
        s.requests.append(("PUT", self.path))
        data = self.content()
        time.sleep(s.slow)
        assert hashlib.sha256(data).hexdigest() == oid
        with s.lock:
            s.large[oid] = data
        self.send(200)

    def do_POST(self):
        path, content = unquote(self.path.partition("?")[0]), self.content()
        self.server.requests.append(("POST", path))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(content))
        if not self.may():
            return None
        for pattern, answer in ((BRANCH, self.branch), (COMMIT, self.commit), (PREUPLOAD, self.preupload), (BATCH, self.batch)):
            if found := re.fullmatch(pattern, path):
                return answer(*found.groups(), content)
        return self.create(json.loads(content)) if path == "/api/repos/create" else self.send(404)

    def validate(self, asked):
        head = re.match(r"---\n(.*?)\n---\n", asked["content"], re.S)
        whole = head and isinstance(yaml.safe_load(head[1]), dict)
        self.send(200 if whole else 400, {} if whole else {"errors": [{"message": "no head"}]})

    def create(self, asked):
        if self.server.fault:
            return self.send(self.server.fault[0], {"error": self.server.fault[1]})
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = (kind, name) in self.server.repositories
        self.server.repositories.setdefault((kind, name), {"main": {}})
        self.server.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
        self.send(409 if there else 200, {"url": f"{self.server.url}/{'datasets/' * (kind == 'dataset')}{name}"})

    def branch(self, kind, name, branch, _):
        branches = self.server.repositories[kind, name]
        there = branch in branches
        branches.setdefault(branch, dict(branches["main"]))
        self.send(409 if there else 200)

    def preupload(self, kind, name, revision, content):
        if (kind, name) not in self.server.repositories or revision not in self.server.repositories[kind, name]:
            return self.send(404, {"error": "Invalid rev id"}, **{"X-Error-Code": "RevisionNotFound"})
        there, told = self.server.files(name, kind, revision), []
        for file in json.loads(content)["files"]:
            is_large = file["path"].endswith((".safetensors", ".png", ".parquet"))
            data = there.get(file["path"])
            oid = {} if data is None else {"oid": hashlib.sha256(data).hexdigest() if is_large else blob(data)}
            told.append({"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, **oid})
        self.send(200, {"files": told})

    def batch(self, kind, name, content):
        objects = []
        for item in json.loads(content)["objects"]:
            where = {"actions": {"upload": {"href": f"{self.server.url}/large/{item['oid']}"}}}
            objects.append({**item, **({} if item["oid"] in self.server.large else where)})
        self.send(200, {"transfer": "basic", "objects": objects})

    def commit(self, kind, name, revision, content):
        lines = [json.loads(line) for line in content.splitlines() if line]
        added = {}
        for line in lines[1:]:
            value = line["value"]
            data = base64.b64decode(value["content"]) if line["key"] == "file" else self.server.large[value["oid"]]
            added[value["path"]] = data
        with self.server.lock:
            self.server.files(name, kind, revision).update(added)
            self.server.commits.append((lines[0]["value"]["summary"], sorted(added)))
        oid = hashlib.sha1(content).hexdigest()
        self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None, "success": True})
