"""A checkpoint counts only when it is whole: cut, missing and half-removed ones are passed over."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest

from research_rl.training.run import checkpoints


def write_safetensors(path: Path, name: str = "weight", values: bytes = b"\0" * 16) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [len(values) // 4], "data_offsets": [0, len(values)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)


def write_checkpoint(folder: Path, step: int, world_size: int = 1) -> Path:
    path = folder / f"global_step_{step}"
    huggingface = path / "actor" / "huggingface"
    huggingface.mkdir(parents=True)
    (path / "actor" / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world_size}))
    names = [f"actor/{part}_world_size_{world_size}_rank_{r}.pt" for part in ("model", "optim", "extra_state") for r in range(world_size)]
    for name in (*names, "data.pt"):
        with zipfile.ZipFile(path / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"step": step}))
            archive.writestr("archive/data/0", b"x" * 1000)
    (huggingface / "config.json").write_text("{}")
    write_safetensors(huggingface / "model.safetensors")
    return path


def test_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        write_checkpoint(tmp_path, step)
    found = checkpoints.latest(tmp_path)
    assert found and found.step == 10
    at_most = checkpoints.latest(tmp_path, 9)
    assert at_most and at_most.step == 4


@pytest.mark.parametrize(
    "name",
    [
        "actor/model_world_size_1_rank_0.pt",
        "actor/optim_world_size_1_rank_0.pt",
        "actor/extra_state_world_size_1_rank_0.pt",
        "actor/huggingface/model.safetensors",
        "actor/fsdp_config.json",
        "data.pt",
    ],
)
@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    write_checkpoint(tmp_path, 1)
    path = write_checkpoint(tmp_path, 2) / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "cut" else 0])
    assert checkpoints.fault(tmp_path / "global_step_2") is not None
    found = checkpoints.latest(tmp_path)
    assert found and found.step == 1


class Interrupted:
    def __reduce__(self) -> str:
        raise SystemExit(1)


def test_an_archive_that_a_dying_process_closed_early_is_passed_over(tmp_path: Path) -> None:
    import torch

    content = {
        "step": 3,
        "weights": torch.ones(4),
        "state": {"moments": [torch.zeros(2), torch.ones(2)], "rng": torch.random.get_rng_state()},
    }
    file = write_checkpoint(tmp_path, 2) / "actor" / "optim_world_size_1_rank_0.pt"
    torch.save(content, file)
    assert checkpoints.fault(tmp_path / "global_step_2") is None
    with zipfile.ZipFile(file) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    (lost,) = [name for name in kept if name.endswith("data/2")]
    with zipfile.ZipFile(file, "w") as archive:
        for name in set(kept) - {lost}:
            archive.writestr(name, kept[name])
    assert checkpoints.fault(tmp_path / "global_step_2") == "actor/optim_world_size_1_rank_0.pt is missing or cut"
    with pytest.raises(SystemExit):
        torch.save({**content, "late": Interrupted()}, file)
    assert zipfile.ZipFile(file).testzip() is None
    assert checkpoints.fault(tmp_path / "global_step_2") == "actor/optim_world_size_1_rank_0.pt is missing or cut"


def test_every_rank_counts(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, world_size=2)
    assert checkpoints.fault(path) is None
    (path / "actor" / "optim_world_size_2_rank_1.pt").unlink()
    assert "rank_1" in str(checkpoints.fault(path))


def test_prune_keeps_the_newest_and_never_the_future(tmp_path: Path) -> None:
    for step in (1, 2, 3, 5):
        write_checkpoint(tmp_path, step)
    (tmp_path / "global_step_4" / "actor").mkdir(parents=True)
    (tmp_path / "global_step_6" / "actor").mkdir(parents=True)
    checkpoints.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_3", "global_step_5", "global_step_6"]
    checkpoints.discard_after(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_3"]


def test_the_checkpoint_before_a_step_that_is_not_judged_yet_is_kept(tmp_path: Path) -> None:
    for step in (2, 3, 4):
        write_checkpoint(tmp_path, step)
    checkpoints.prune(tmp_path, 1, judged=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_3", "global_step_4"]


def test_nothing_to_prune_in_an_empty_run(tmp_path: Path) -> None:
    checkpoints.prune(tmp_path, 2)
    assert checkpoints.latest(tmp_path) is None


@pytest.mark.parametrize("name", ["actor/model_world_size_1_rank_0.pt", "actor/huggingface/model.safetensors", "data.pt", checkpoints.SEAL])
def test_one_altered_byte_of_a_sealed_checkpoint_is_found_and_told(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, 1)
    path = write_checkpoint(tmp_path, 2)
    checkpoints.seal(path)
    assert checkpoints.fault(path, verify=True) is None
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 0x04
    (path / name).write_bytes(content)
    told: list[tuple[int, str]] = []
    found = checkpoints.latest(tmp_path, verify=True, passed_over=lambda checkpoint, why: told.append((checkpoint.step, why)))
    assert found and found.step == 1
    assert [step for step, _ in told] == [2] and told[0][1]


def test_an_unsealed_archive_is_held_to_its_own_checksums(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1) / "data.pt"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"x" * 1000, b"x" * 999 + b"y"))
    assert checkpoints.fault(tmp_path / "global_step_1") is None
    assert checkpoints.latest(tmp_path, verify=True) is None


def test_the_seal_is_the_same_however_often_it_is_set(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1)
    checkpoints.seal(path)
    first = (path / checkpoints.SEAL).read_bytes()
    checkpoints.seal(path)
    assert (path / checkpoints.SEAL).read_bytes() == first and "data.pt" in first.decode()
