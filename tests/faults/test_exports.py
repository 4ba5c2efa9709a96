"""Exports that are killed, run out of disk or are damaged: old files, new files or named errors, never halves."""

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TinyModule, loaders, trainer
from torch import nn

from lightslim import CompressionError, UniformPruneStrategy, load_compressed
from lightslim.export import export
from lightslim.export.bench import bench, read_manifest
from lightslim.inspection import inspection
from lightslim.quantize import transform

ROOT = Path(__file__).parents[2]

# Each child counts the lines that it runs in the files that write, and dies at one of them
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from torch import nn
from lightslim.export import export
from lightslim.quantize import transform

FILES = ("lightslim/files.py", "export/files.py", "export/exporter.py", "export/weights.py", "export/manifest.py")
folder, format_ = Path(sys.argv[1]), sys.argv[2]

def net(seed):
    torch.manual_seed(seed)
    made = transform(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    made(torch.randn(8, 16))
    return made

class Killer:
    def __init__(self, at): self.at, self.seen = at, 0
    def __call__(self, frame, event, _):
        return self.line if frame.f_code.co_filename.endswith(FILES) else None
    def line(self, frame, event, _):
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.line

def written(seed, name, killer):
    sys.settrace(killer)
    export(net(seed), torch.randn(8, 16), folder / name, format=format_)
    sys.settrace(None)
    return killer.seen

written(0, "old", Killer(0))
lines = written(1, "new", Killer(0))
for k in range(20):
    target = folder / f"target{k}"
    for end in ("", ".json"):
        target.with_name(target.name + end).write_bytes((folder / f"old{end}").read_bytes())
    child = os.fork()
    if not child:
        written(1, target.name, Killer(1 + k * (lines - 1) // 19))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(json.dumps(lines))
"""


def net(seed=0):
    torch.manual_seed(seed)
    made = transform(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    made(torch.randn(8, 16))
    return made


def plain():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def whole(path):
    """Whether a file and its manifest belong together; an error otherwise."""
    return read_manifest(path)["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["float", "onnx"])
def test_twenty_kills_leave_the_old_file_or_the_new_one(tmp_path, format_, record_property):
    (tmp_path / "kill.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "kill.py"), str(tmp_path), format_],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) > 20
    old, new = ((tmp_path / name).read_bytes() for name in ("old", "new"))
    found = [(tmp_path / f"target{k}").read_bytes() for k in range(20)]
    assert {content in (old, new) for content in found} == {True}
    assert found[0] == old
    assert found[-1] == new
    for k, content in enumerate(found):
        manifest = json.loads((tmp_path / f"target{k}.json").read_text())
        belongs = manifest["sha256"] == hashlib.sha256(content).hexdigest()
        assert belongs or content == new  # killed between the file and its manifest: bench says so
    record_property("exports, kills survived", f"20 of 20 ({format_})")


@pytest.mark.parametrize("format_", ["float", "onnx"])
def test_a_full_disk_at_twenty_points_leaves_the_old_file(tmp_path, format_, record_property):
    path, x = tmp_path / "net.bin", torch.randn(8, 16)
    size = export(net(1), x, path, format=format_)["bytes"]
    export(net(0), x, path, format=format_)
    old = path.read_bytes(), whole(path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for k in range(20):
        try:
            # SIGXFSZ is ignored by Python: a write beyond the limit fails like one on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (k * (size - 1) // 19, hard))
            with pytest.raises(CompressionError, match=r"net\.bin cannot be written"):
                export(net(1), x, path, format=format_)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert (path.read_bytes(), whole(path)) == old
        assert sorted(one.name for one in tmp_path.iterdir()) == ["net.bin", "net.bin.json"]
    record_property("exports, full disks survived", f"20 of 20 ({format_})")


def damaged(content, generator):
    """One bit flipped, or the end cut off."""
    if generator.random() < 0.8:
        at = generator.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]
    return content[: generator.randrange(len(content))]


def test_no_damage_goes_unnoticed_by_load_compressed(tmp_path, record_property):
    path, generator = tmp_path / "net.pt", random.Random(0)
    export(net(), torch.randn(8, 16), path, format="float")
    content, expected = path.read_bytes(), load_compressed(plain, path).state_dict()
    refused = 0
    for _ in range(600):
        path.write_bytes(damaged(content, generator))
        try:
            loaded = load_compressed(plain, path).state_dict()
        except CompressionError as error:
            refused += "net.pt" in str(error)
        else:  # what holds no value of ours, as a time or a padding
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert refused > 300
    record_property("exports, damages refused", f"{refused} of 600 (float); the others change no value")


def test_no_damage_goes_unnoticed_by_inspect(tmp_path, record_property):
    path, generator = tmp_path / "last.ckpt", random.Random(0)
    fit = trainer(tmp_path, UniformPruneStrategy(target_ratio=0.5), max_epochs=1)
    fit.fit(TinyModule(), *loaders())
    fit.save_checkpoint(path)
    content, expected = path.read_bytes(), inspection(str(path))
    assert "prune at epoch 0" in expected
    refused = 0
    for _ in range(300):
        path.write_bytes(damaged(content, generator))
        try:
            assert inspection(str(path)) == expected
        except CompressionError as error:
            refused += "last.ckpt" in str(error)
    assert refused > 200
    record_property("checkpoints, damages refused by inspect", f"{refused} of 300; the others change no word")


def test_no_damage_goes_unnoticed_by_bench(tmp_path, record_property):
    path, generator = tmp_path / "net.onnx", random.Random(0)
    export(net(), torch.randn(8, 16), path, format="onnx")
    content = path.read_bytes()
    for _ in range(100):
        path.write_bytes(damaged(content, generator))
        with pytest.raises(CompressionError, match=r"net\.onnx is not the file that net\.onnx\.json describes"):
            bench([path], rounds=2)
    path.write_bytes(content)
    assert bench([path], rounds=2)[0]["bytes"] == len(content)
    record_property("exports, damages refused", "100 of 100 (onnx)")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00true."])
def test_foreign_files_are_named(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(CompressionError, match="foreign cannot be read as a checkpoint"):
        load_compressed(plain, path)
    with pytest.raises(CompressionError, match="foreign cannot be read as a checkpoint"):
        inspection(str(path))
    with pytest.raises(CompressionError, match=r"foreign has no foreign\.json beside it"):
        bench([path])


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_payload_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "more": Payload()}, "payload.ckpt")
    with pytest.raises(CompressionError, match=r"payload\.ckpt cannot be read as a checkpoint"):
        load_compressed(plain, "payload.ckpt")
    with pytest.raises(CompressionError, match=r"payload\.ckpt cannot be read as a checkpoint"):
        inspection("payload.ckpt")
    assert not Path("executed").exists()
