"""timm's weights come from the hub's cache or from a hub that answers; one that fails is left."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from served import Server

import lenslet.files
from lenslet.errors import OutsideError
from lenslet.training import hub, pretrained

RESNET, CONVNEXT = "test_resnet", "test_convnext"
DAY = 24 * 3600


def address(model):
    return f"/timm/{model}.r160_in1k/resolve/main/model.safetensors"


@pytest.fixture(scope="module")
def contents():
    """{path at the hub: content} of the weights of two small networks."""
    torch.manual_seed(0)
    return {address(m): save(timm.create_model(m).state_dict()) for m in (RESNET, CONVNEXT)}


@pytest.fixture
def server(contents, tmp_path, monkeypatch):
    """A hub on this machine, and an empty cache of the hub's."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(dict(contents))
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def use(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)

    server.use = use
    use(server.url)
    monkeypatch.setattr(hub, "PATIENCE", 60)
    yield server
    server.close()


def memory():
    return lenslet.files.DATA / "hub.json"


def weights_files(tmp_path):
    """What the cache holds that may pass for weights, or is a part of some."""
    files = (tmp_path / "cache").rglob("*")
    return [f for f in files if f.parent.name == "blobs" or "safetensors" in f.name]


def test_downloaded_once(server, contents):
    """The first of the list is downloaded, with a note; then no hub is needed for it."""
    name, note = pretrained.find_pretrained([RESNET, CONVNEXT])
    size = len(contents[address(RESNET)]) / 1e6
    what = f"timm/{RESNET}.r160_in1k from {{}}, {size:.1f} MB, licence: apache-2.0"
    assert (name, note) == (RESNET, "pretrained weights: " + what.format(server.url))
    assert not any(CONVNEXT in path for path in server.asked) and not memory().exists()
    server.fault = 503
    asked = len(server.asked)
    assert pretrained.find_pretrained([RESNET])[1].endswith(what.format("the hub's cache"))
    assert len(server.asked) == asked
    tensors, _ = pretrained.read_weights("timm", RESNET)
    assert save(tensors) == contents[address(RESNET)]


SCRIPT = """
import sys, torch
from lenslet.training import hub, pretrained
hub.PATIENCE = 60
torch.manual_seed(0)
print(pretrained.find_pretrained(["test_resnet.r160_in1k"])[0])
tensors, header = pretrained.read_weights("timm", "test_resnet.r160_in1k")
torch.save([tensors, torch.rand(1)], sys.argv[1])
"""


def test_the_hubs_own_settings(server, contents, tmp_path):
    """HF_ENDPOINT and HF_HOME count, plain https is used, and the random generator stays.

    In a process of its own, for the hub's settings are read when its library is imported.
    """
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "read")]
    places = {"cwd": lenslet.files.ROOT, "env": os.environ | hub}
    done = subprocess.run(command, **places, capture_output=True, text=True, check=True)
    tensors, drawn = torch.load(tmp_path / "read")
    assert done.stdout == "test_resnet.r160_in1k\n"
    assert save(tensors) == contents[address(RESNET)]
    assert server.asked.count(address(RESNET)) == 3  # HEAD twice, GET once
    assert "/xet" not in server.asked  # whose servers may not be reachable where the hub is
    assert list((tmp_path / "hf" / "hub").rglob("model.safetensors"))
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("licence", [None, "unknown"])
def test_unknown_licence(server, monkeypatch, licence):
    """Where timm does not know the licence, the note says where to look."""
    config = timm.get_pretrained_cfg(RESNET)
    config.license = licence
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: config)
    note = pretrained.find_pretrained([RESNET])[1]
    assert note.endswith(f"licence: see {server.url}/timm/{RESNET}.r160_in1k")


@pytest.mark.parametrize("fault", ["refused", "unresolved", "mute", "drop", "stalled", 503])
def test_a_hub_that_fails_is_remembered(server, monkeypatch, fault):
    """No weights, in one line; for a day the hub is not asked, unless the user says so."""
    server.fault, url = fault, server.url
    if fault == "refused":
        url = "http://127.0.0.1:9"
    elif fault == "unresolved":
        url, resolve = "http://nowhere.invalid", socket.getaddrinfo

        def fail(host, *args, **options):
            if host in ("nowhere.invalid", b"nowhere.invalid"):
                raise socket.gaierror(-2, "Name or service not known")
            return resolve(host, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", fail)
    elif fault == "mute":
        monkeypatch.setattr(hub, "PATIENCE", 0.1)
    else:
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.use(url)
    told = []
    for _ in range(2):
        told.append(pretrained.find_pretrained([RESNET, CONVNEXT]))
        assert url != server.url or bool(server.asked) == (len(told) == 1)
        server.asked.clear()
    assert told[0] == told[1]
    name, note = told[0]
    when = time.localtime(json.loads(memory().read_text())["time"])
    start, _, why = note.partition(f"{url}: ")
    assert name is None and note.count("tried at") == 1 and "\n" not in note
    assert start == (
        f"no pretrained weights for {RESNET} or {CONVNEXT}, so training starts from scratch: "
    )
    assert {"mute": "no answer in 0.1 s", "drop": "disconnected", 503: "503"}.get(fault, "") in why
    assert f"(tried at {when.tm_hour:02}:{when.tm_min:02}; to try again at once, delete " in why
    server.fault = None
    server.use(server.url)
    pretrained.read_weights("timm", CONVNEXT)  # by name: the hub is asked, and answers
    assert not memory().exists() or url != server.url
    memory().unlink(missing_ok=True)
    assert pretrained.find_pretrained([RESNET])[0] == RESNET


def test_a_silent_hub_hides_no_cached_weights(server):
    """A later network's cached weights are taken only where the first one's cannot be had."""
    pretrained.read_weights("timm", CONVNEXT)
    server.fault = 503
    for _ in range(2):  # the second time, the failure is remembered
        name, note = pretrained.find_pretrained([RESNET, CONVNEXT])
        assert name == CONVNEXT and "from the hub's cache" in note and "503" in note
    memory().unlink()
    server.fault = None
    assert pretrained.find_pretrained([RESNET, CONVNEXT])[0] == RESNET


def test_what_counts_as_remembered(server):
    """A failure of another hub, of yesterday or of the future counts as none, and damage too."""
    known = {"endpoint": server.url, "time": time.time() - DAY + 99, "why": "no answer"}
    memory().parent.mkdir()
    memory().write_text(json.dumps(known))
    assert hub.silence().startswith("no answer (tried at ")
    others = [{"endpoint": "https://other"}, {"time": known["time"] - 100}, {"why": None}]
    others += [{"time": value} for value in (time.time() + 99, None, "x", 10**400, float("nan"))]
    texts = [json.dumps(known | other) for other in others]
    texts[2] = json.dumps({key: known[key] for key in ("endpoint", "time")})
    for text in (*texts, "", "{", "[]", "null", "[" * 100_000, "\xff"):
        memory().write_bytes(text.encode("latin-1"))
        assert hub.silence() == ""


def test_memory_that_cannot_be_written(server):
    """Where nothing can be written below data, the failure of the hub stays the only problem."""
    lenslet.files.DATA.write_text("")
    server.fault = 503
    assert pretrained.find_pretrained([RESNET])[0] is None


@pytest.mark.parametrize("fault", ["cut", "short", "html", "portal"])
def test_broken_downloads(server, contents, tmp_path, monkeypatch, fault):
    """What arrives damaged is no weights, is not kept, and the next try can succeed."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if fault == "html":  # as the repository's file
        server.files[address(RESNET)] = b"<html>busy</html>"
    else:
        server.fault = fault
    name, note = pretrained.find_pretrained([RESNET])
    assert name is None and f"{server.url}/timm/{RESNET}.r160_in1k: " in note and "\n" not in note
    assert fault != "html" or "cannot be read as weights" in note
    assert not weights_files(tmp_path) and not memory().exists()
    with pytest.raises(OutsideError):
        pretrained.read_weights("timm", RESNET)
    assert not weights_files(tmp_path)
    server.fault, server.files = None, contents
    assert pretrained.find_pretrained([RESNET])[0] == RESNET


@pytest.mark.parametrize("content", ["damaged", "of another network"])
def test_cached_weights_that_cannot_be_read(server, contents, tmp_path, content):
    """A cached file that is damaged or another network's is named, and is no weights."""
    pretrained.read_weights("timm", RESNET)
    (path,) = (tmp_path / "cache").rglob("model.safetensors")
    other = contents[address(CONVNEXT)]
    path.resolve().write_bytes(other if content != "damaged" else other[:1000])
    name, note = pretrained.find_pretrained([RESNET])
    assert name is None and "delete it" in note and "\n" not in note
    assert re.search(rf"{path}: (not a complete|not the weights of {RESNET})", note)
    assert pretrained.find_pretrained([RESNET, CONVNEXT])[0] == CONVNEXT


def test_offline(server, monkeypatch):
    """HF_HUB_OFFLINE: nobody is asked and no failure remembered; cached weights are found."""
    pretrained.read_weights("timm", CONVNEXT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    name, note = pretrained.find_pretrained([RESNET])
    assert name is None and note.endswith(": the hub is not asked, because HF_HUB_OFFLINE is set")
    assert pretrained.find_pretrained([RESNET, CONVNEXT])[0] == CONVNEXT
    with pytest.raises(OutsideError):
        pretrained.read_weights("timm", RESNET)
    assert not server.asked and not memory().exists()


def test_networks_without_weights_on_the_hub(server):
    """They are passed over, with a note; a hub that lacks a file is asked for the next one's."""
    del server.files[address(RESNET)]
    models = ["fastnet", "torchvision/resnet18", "legacy_senet154", RESNET, CONVNEXT]
    name, note = pretrained.find_pretrained(models)
    assert name == CONVNEXT and "fastnet is not a timm network" in note
    assert "timm's weights for legacy_senet154 are not on the hub" in note
    assert pretrained.find_pretrained(models[:3])[0] is None and not memory().exists()
