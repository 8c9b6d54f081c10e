"""hf:// addresses, through the real huggingface_hub, against a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

import lotrtensor as lt
from adapters_fixtures import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Outcome,
    assert_refused,
    bert_pairs,
    read_header,
    write_lora,
)
from lotrtensor.adapters.hub import parse_address

pytest.importorskip("huggingface_hub")

COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/3": "c" * 40}


class Hub:
    """The few answers of a model hub that a download asks for, and a record of what was asked."""

    def __init__(self):
        self.repos = {}  # (owner/name, commit) -> directory
        self.refused = {}  # owner/name -> status and headers of every answer
        self.asked = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fetched(self):
        """Names of the files whose contents were sent."""
        return sorted({path.rpartition("/")[2] for verb, path in self.asked if verb == "FILE"})

    def answer(self, request):
        path = request.path.partition("?")[0].replace("%2F", "/")
        self.asked.append((request.command, path))
        api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models/" if api else "/").split("/")
        repo = f"{owner}/{name}"
        if repo in self.refused:
            return self.send(request, *self.refused[repo])
        if not any(known == repo for known, _ in self.repos):
            return self.send(request, 401, {"X-Error-Code": "RepoNotFound"})
        kind, *rest = rest or ["revision", "main"]
        revision = "/".join(rest[:3]) if rest[0] == "refs" else rest[0]
        commit = COMMITS.get(revision, revision)
        if (repo, commit) not in self.repos:
            return self.send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        root = self.repos[repo, commit]
        if kind == "revision":
            return self.send_json(request, {"id": repo, "sha": commit, "siblings": []})
        if kind == "tree":
            return self.send_json(request, [self.entry(p, root) for p in files_of(root)])
        assert kind == "resolve", path
        file = root / "/".join(rest[1:])
        content = file.read_bytes()
        if request.command == "GET":
            self.asked.append(("FILE", path))
        headers = {"ETag": f'"{oid(content)}"', "X-Repo-Commit": commit}
        return self.send(request, 200, headers, content)

    @staticmethod
    def entry(path, root):
        content = path.read_bytes()
        name = str(path.relative_to(root))
        return {"type": "file", "path": name, "size": len(content), "oid": oid(content)}

    def send_json(self, request, value):
        self.send(request, 200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    @staticmethod
    def send(request, status, headers, content=b""):
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


def oid(content):
    return hashlib.sha1(content).hexdigest()


def files_of(root):
    return sorted(p for p in root.rglob("*") if p.is_file())


class Place(NamedTuple):
    """A hub with one repository, and the environment of a process that uses it."""

    hub: Hub
    env: dict[str, str]
    root: Path

    def run(self, program, *args, **env):
        """Run a program in a process of its own: huggingface_hub reads its settings once."""
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, args)],
            capture_output=True,
            check=False,
            env=self.env | env,
            timeout=120,
        )
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    def lotr(self, *args, **env):
        return self.run("from lotrtensor.cli import main; main()", *args, **env)


@pytest.fixture
def place(tmp_path):
    hub = Hub()
    root = write_lora(tmp_path / "repo", bert_pairs(layers=2))
    for name in ("README.md", "adapter_model.bin", "optimizer.pt", "model.safetensors"):
        (root / name).write_text("not needed")
    hub.repos["owner/lora", COMMITS["main"]] = root
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    yield Place(hub, env | settings, root)
    hub.close()


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://owner/name", ("owner/name", None, "")),
        ("hf://owner/name/", ("owner/name", None, "")),
        ("hf:/owner/name", ("owner/name", None, "")),
        (Path("hf://owner/name@v1"), ("owner/name", "v1", "")),
        ("hf://owner/na.me-1@main/a/b.safetensors", ("owner/na.me-1", "main", "a/b.safetensors")),
        ("hf://owner/name@refs/pr/3/sub", ("owner/name", "refs/pr/3", "sub")),
        ("hf://owner/name@feature%2Fx", ("owner/name", "feature/x", "")),
    ],
)
def test_addresses(text, parts):
    assert parse_address(text) == parts


@pytest.mark.parametrize(
    "text", ["hf://", "hf://name", "hf:///name", "hf://owner/name@", "hf://a@b/c"]
)
def test_other_addresses_are_refused(text):
    with pytest.raises(lt.FormatError, match="expected hf://owner/name"):
        lt.load(text)


# --- what is fetched ------------------------------------------------------------------------------


def test_the_files_of_the_adapter_alone_are_fetched_once(place):
    first = place.lotr("inspect", "hf://owner/lora", "--json")
    assert (first.code, first.err) == (0, "")
    assert json.loads(first.out)["type"] == "LORA"
    assert place.hub.fetched() == [CONFIG, WEIGHTS]
    place.hub.asked.clear()
    assert place.lotr("inspect", "hf://owner/lora", "--json").out == first.out
    assert place.hub.fetched() == []
    place.hub.close()
    for env in ({"HF_HUB_OFFLINE": "1"}, {}):
        assert place.lotr("inspect", "hf://owner/lora", "--json", **env).out == first.out


def test_every_command_takes_an_address(place, tmp_path):
    address, out = "hf://owner/lora", tmp_path / "lotr"
    assert place.lotr("convert", address, "-o", out, "--rank", 3).code == 0
    assert place.lotr("truncate", address, "-o", tmp_path / "small", "--rank", 1).code == 0
    found = place.lotr("verify", address, out, "--json")
    assert 0 < json.loads(found.out)["relative_error"] < 1
    place.hub.repos["owner/lotr", COMMITS["main"]] = out
    assert place.lotr("export", "hf://owner/lotr", "-o", tmp_path / "lora").code == 0
    assert place.lotr("export", address, "-o", tmp_path / "x").err.count(address) == 1


def test_load_takes_an_address_and_a_path_that_lost_a_slash(place):
    program = """
import sys
from pathlib import Path
import lotrtensor as lt
a, b = lt.load(sys.argv[1]), lt.load(Path(sys.argv[1]))
print(len(a.modules), lt.compare(a, b).relative_error)
"""
    assert place.run(program, "hf://owner/lora").out == "6 0.0\n"


def test_a_revision_is_pinned(place, tmp_path):
    for revision, rank in (("v1", 2), ("refs/pr/3", 1)):
        root = write_lora(tmp_path / f"repo{rank}", bert_pairs(layers=2, r=rank))
        place.hub.repos["owner/lora", COMMITS[revision]] = root
    for revision, rank in ((None, 3), ("v1", 2), (COMMITS["v1"], 2), ("refs/pr/3", 1)):
        address = "hf://owner/lora" + (f"@{revision}" if revision else "")
        found = json.loads(place.lotr("inspect", address, "--json").out)
        assert {r for group in found["groups"] for r in group["lora_ranks"]} == {rank}


def test_shards_and_a_directory_in_the_repository(place):
    sub = place.root / "checkpoint-5"
    sub.mkdir()
    shard = "adapter_model-00001-of-00001.safetensors"
    (sub / CONFIG).write_bytes((place.root / CONFIG).read_bytes())
    (sub / shard).write_bytes((place.root / WEIGHTS).read_bytes())
    keys = read_header(place.root / WEIGHTS)
    (sub / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, shard)}))
    found = place.lotr("inspect", "hf://owner/lora/checkpoint-5", "--json")
    assert found.code == 0, found.err
    assert place.hub.fetched() == sorted([CONFIG, shard, INDEX])


def test_a_single_file(place):
    import numpy as np
    import safetensors.numpy

    tensors = {}
    for layer in range(2):
        name = f"lora_unet_blocks_{layer}_q"
        tensors[f"{name}.lora_down.weight"] = np.ones((1, 4), "f4")
        tensors[f"{name}.lora_up.weight"] = np.ones((4, 1), "f4")
    safetensors.numpy.save_file(tensors, place.root / "cat.safetensors")
    safetensors.numpy.save_file(tensors, place.root / "dog.safetensors")
    found = place.lotr("inspect", "hf://owner/lora/cat.safetensors", "--json")
    assert json.loads(found.out)["file_style"] == "kohya"
    assert place.hub.fetched() == ["cat.safetensors"]


# --- what goes wrong ------------------------------------------------------------------------------


def refused(place, address, *words, **env):
    found = place.lotr("convert", address, "-o", place.root.parent / "out", "--rank", 1, **env)
    assert_refused(found, *words)
    assert not (place.root.parent / "out").exists()


def test_no_such_repository_or_a_private_one(place):
    refused(place, "hf://owner/nothing", "hf://owner/nothing", "check the name", "hf auth login")


def test_a_gated_repository(place):
    place.hub.refused["owner/lora"] = (403, {"X-Error-Code": "GatedRepo"})
    refused(place, "hf://owner/lora", "hf://owner/lora is gated", "terms", "HF_TOKEN")


def test_no_such_revision(place):
    refused(place, "hf://owner/lora@v9", "hf://owner/lora@v9 has no revision v9", "tag")


def test_no_such_file(place):
    refused(place, "hf://owner/lora/cat.safetensors", "cat.safetensors", "no such file")


def test_offline(place):
    words = ["hf://owner/lora is not in the cache", "HF_HUB_OFFLINE", "local copy"]
    refused(place, "hf://owner/lora", *words, HF_HUB_OFFLINE="1")


def test_a_hub_that_is_not_there(place):
    place.hub.close()
    refused(place, "hf://owner/lora", "cannot be reached", "HF_ENDPOINT", "local copy")


def test_a_hub_in_trouble(place):
    place.hub.refused["owner/lora"] = (500, {})
    refused(place, "hf://owner/lora", "hf://owner/lora", "500", "local copy")


def test_pickled_weights_are_not_fetched(place):
    (place.root / WEIGHTS).unlink()
    refused(place, "hf://owner/lora", "pickled", "save_pretrained")
    assert place.hub.fetched() == [CONFIG]


def test_a_base_model_is_no_adapter(place):
    for name in (CONFIG, WEIGHTS):
        (place.root / name).unlink()
    refused(place, "hf://owner/lora", CONFIG, "hf://owner/lora/FILE.safetensors")
    assert place.hub.fetched() == []


def test_without_the_package(place):
    program = """
import sys
sys.modules["huggingface_hub"] = None
from lotrtensor.cli import main
main()
"""
    found = place.run(program, "inspect", "hf://owner/lora")
    assert_refused(found, "huggingface_hub", "pip install 'lotrtensor[hub]'")


def test_names_that_no_repository_has(place):
    refused(place, "hf://owner/na me", "hf://owner/na me", "expected hf://owner/name")
