"""Launch commands, model checks and wire formats of the model servers, without starting one."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import yaml

from research_rl.config import Config, ServingConfig
from research_rl.episode.agent import Completion
from research_rl.errors import ModelError, ServiceError
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint
from research_rl.serving import client, launch, model
from research_rl.serving.client import Sampling
from research_rl.serving.serve import running
from research_rl.serving.tensors import Output, write

STOP = ("</search>",)


def folder(path: Path, **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    settings = {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 2048, "vocab_size": 2, **config}
    (path / "config.json").write_text(json.dumps(settings))
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1}, "unk_token": "<unk>"}
    (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    write(path / "model.safetensors", [Output("embed.weight", "F32", (2, 4), 32, lambda: iter([b"0" * 32]))])
    return path


def render(tmp_path: Path, **settings: object) -> launch.Launch:
    found = model.check(folder(tmp_path / "m"), 1024)
    config = ServingConfig.model_validate(settings)
    return launch.render(
        config, found, served_name="policy-x", interpreter="py", port=81, token="secret", context=1024, secrets=tmp_path / "services"
    )


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_no_command_shows_the_token(tmp_path: Path, engine: str, hardware: str) -> None:
    plan = render(tmp_path, engine=engine, hardware=hardware)
    assert "secret" not in " ".join(plan.command)
    assert "secret" in json.dumps([plan.env, [str(text) for text in plan.files.values()]])


def test_vllm_on_cpu_compiles_nothing_and_keeps_the_engine_in_one_process(tmp_path: Path) -> None:
    plan = render(tmp_path, dtype="bfloat16", max_sequences=7, kv_cache_gib=2)
    assert plan.command[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    assert option(plan.command, "--max-model-len") == "1024"
    assert option(plan.command, "--max-num-seqs") == "7"
    assert option(plan.command, "--served-model-name") == "policy-x"
    assert option(plan.command, "--dtype") == "bfloat16"
    assert option(plan.command, "--host") == "127.0.0.1"
    assert option(plan.command, "--allowed-origins") == "[]", "no web page may read the answers"
    assert "--enforce-eager" in plan.command
    wanted = {"TORCH_COMPILE_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": "1"}
    assert wanted.items() <= plan.env.items()
    assert plan.env["VLLM_NO_USAGE_STATS"] == plan.env["DO_NOT_TRACK"] == plan.env["HF_HUB_OFFLINE"] == "1"


def test_vllm_on_gpu_keeps_its_graphs(tmp_path: Path) -> None:
    plan = render(tmp_path, hardware="gpu", tensor_parallel=4, gpu_memory_utilization=0.7)
    assert "--enforce-eager" not in plan.command
    assert option(plan.command, "--tensor-parallel-size") == "4"
    assert option(plan.command, "--gpu-memory-utilization") == "0.7"
    assert not {"TORCH_COMPILE_DISABLE", "VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"} & set(plan.env)


def test_a_large_model_uses_every_core_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6))
    large = model.ModelFolder(tmp_path, "Qwen2ForCausalLM", launch.SMALL_BYTES, None)
    small = model.ModelFolder(tmp_path, "Qwen2ForCausalLM", launch.SMALL_BYTES - 1, None)
    assert [launch.threads(None, size.weight_bytes) for size in (large, small)] == [6, 1]
    assert launch.threads(3, large.weight_bytes) == 3


@pytest.mark.parametrize(("engine", "flag"), [("vllm", "--enforce-eager"), ("sglang", "--cuda-graph-backend-decode")])
def test_a_gpu_uses_graphs_unless_told_otherwise(tmp_path: Path, engine: str, flag: str) -> None:
    assert flag in render(tmp_path, engine=engine, hardware="gpu", eager=True).command
    assert flag not in render(tmp_path, engine=engine, hardware="gpu").command


def test_sglang_command(tmp_path: Path) -> None:
    plan = render(tmp_path, engine="sglang", hardware="gpu", tensor_parallel=2, dtype="bfloat16", max_sequences=9)
    assert plan.command[:3] == ["py", "-m", "sglang.launch_server"]
    expected = {
        "--model-path": str(tmp_path / "m"),
        "--served-model-name": "policy-x",
        "--host": "127.0.0.1",
        "--port": "81",
        "--dtype": "bfloat16",
        "--context-length": "1026",
        "--max-running-requests": "9",
        "--tp-size": "2",
        "--mem-fraction-static": "0.85",
    }
    assert {name: option(plan.command, name) for name in expected} == expected
    options = Path(option(plan.command, "--config"))
    assert yaml.safe_load(plan.files[options]) == {"api-key": "secret"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda path: (path / "model.safetensors").unlink(), "has no \\*.safetensors"),
        (lambda path: (path / "config.json").write_text("{"), "is not JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "holds a list"),
        (lambda path: (path / "config.json").write_text("{}"), "names no architectures"),
        (lambda path: folder(path, max_position_embeddings=512), "reads 512 tokens, .* = 1024"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model.safetensors", "b": "x-2.safetensors"}}'
            ),
            "lacks 1 of 2 weight files, x-2.safetensors first",
        ),
    ],
)
def test_a_spoilt_model_folder_is_named(tmp_path: Path, spoil: object, message: str) -> None:
    path = folder(tmp_path / "m")
    assert model.check(path, 1024).weight_bytes == (path / "model.safetensors").stat().st_size
    spoil(path)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        model.check(path, 1024)


def test_a_wrong_model_folder_ends_before_anything_starts(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    with pytest.raises(ModelError, match="does not exist"), running(Config(), workspace, tmp_path / "nowhere"):
        pytest.fail("served nothing")
    assert not workspace.root.exists()


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = Config.model_validate({"environments": {"policy": str(tmp_path / "python")}})
    with pytest.raises(ServiceError, match=r"make setup"), running(config, Workspace(tmp_path), folder(tmp_path / "m")):
        pytest.fail("served nothing")


def test_a_dead_address_is_named(tmp_path: Path) -> None:
    config = Config.model_validate({"serving": {"url": "http://127.0.0.1:9"}})
    with (
        pytest.raises(ServiceError, match=r"http://127\.0\.0\.1:9 does not answer /v1/models .*serving\.url"),
        running(config, Workspace(tmp_path), folder(tmp_path / "m")),
    ):
        pytest.fail("served nothing")


def vllm_reply(ids: list[int], finish: str, reason: object, logprobs: list[float] | None = None) -> dict[str, object]:
    choice = {"index": 0, "text": "", "finish_reason": finish, "stop_reason": reason, "token_ids": ids, "prompt_logprobs": None}
    return {"object": "text_completion", "choices": [{**choice, "logprobs": {"token_logprobs": logprobs} if logprobs else None}]}


@pytest.mark.parametrize(
    ("finish", "reason", "expected"),
    [("stop", "</search>", "stop"), ("stop", None, "eos"), ("stop", 151643, "eos"), ("length", None, "length")],
)
def test_vllm_finish_reasons(finish: str, reason: object, expected: str) -> None:
    assert client.parse_vllm(vllm_reply([4, 5], finish, reason), STOP) == Completion((4, 5), (0.0, 0.0), expected)  # type: ignore[arg-type]


def test_vllm_replies_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ServiceError, match="finish_reason='abort'"):
        client.parse_vllm(vllm_reply([4], "abort", None), STOP)
    with pytest.raises(ServiceError, match="2 ids and 1 log-prob"):
        client.parse_vllm(vllm_reply([4, 5], "stop", None, [-1.0]), STOP)
    with pytest.raises(ServiceError, match="no token_ids"):
        client.parse_vllm({"choices": [{"text": "a", "finish_reason": "stop"}]}, STOP)


def sglang_reply(finish: dict[str, object]) -> dict[str, object]:
    meta = {"id": "1", "finish_reason": finish, "prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0}
    return {"text": "x", "output_ids": [8, 9], "meta_info": {**meta, "output_token_logprobs": [[-0.25, 8, None], [-0.5, 9, None]]}}


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        ({"type": "stop", "matched": "</search>"}, "stop"),
        ({"type": "stop", "matched": 151645}, "eos"),
        ({"type": "length", "length": 2}, "length"),
    ],
)
def test_sglang_finish_reasons(finish: dict[str, object], expected: str) -> None:
    assert client.parse_sglang(sglang_reply(finish), STOP) == Completion((8, 9), (-0.25, -0.5), expected)  # type: ignore[arg-type]


def test_a_text_that_was_no_stop_string_is_a_failure_and_no_stop() -> None:
    with pytest.raises(ServiceError, match=r"ended a sequence at 'NaN happened', which is no stop string of \['</search>'\]"):
        client.parse_sglang(sglang_reply({"type": "stop", "matched": "NaN happened"}), STOP)


def test_an_id_that_the_model_does_not_have_is_refused_before_it_is_sent() -> None:
    async def main() -> None:
        async with client.HttpEngine(Endpoint("http://127.0.0.1:9", model="policy-x", vocabulary=8), Sampling()) as engine:
            await engine.generate([7, 8], STOP, 1)

    with pytest.raises(ModelError, match="token id 8 is none of the 8 of policy-x"):
        asyncio.run(main())


def test_sglang_on_cpu_leaves_memory_and_cores_to_others(tmp_path: Path) -> None:
    plan = render(tmp_path, engine="sglang", threads=1)
    assert option(plan.command, "--device") == "cpu" and "--sleep-on-idle" in plan.command
    assert option(plan.command, "--max-total-tokens") == str(launch.CPU_CACHE_TOKENS)
    assert plan.env["OMP_NUM_THREADS"] == "1" and int(plan.env["SGLANG_CPU_OMP_THREADS_BIND"]) in os.sched_getaffinity(0)
    assert "--mem-fraction-static" not in plan.command


def test_sglang_follows_seeds_where_tokens_are_drawn(tmp_path: Path) -> None:
    found = model.check(folder(tmp_path / "m"), 1024)
    about = {"served_name": "x", "interpreter": "py", "port": 81, "token": "t", "context": 1024, "secrets": tmp_path}
    for engine, seeded, told in (("sglang", True, True), ("sglang", False, False), ("vllm", True, False)):
        plan = launch.render(ServingConfig(engine=engine), found, seeded=seeded, **about)  # type: ignore[arg-type]
        assert ("--enable-deterministic-inference" in plan.command) is told


def test_a_model_must_read_what_sglang_keeps_for_itself_as_well(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", max_position_embeddings=1025)
    model.check(path, 1024)
    with pytest.raises(ModelError, match=r"reads 1025 tokens, .* = 1024 and the server keeps 2 for itself"):
        model.check(path, 1024, launch.RESERVED["sglang"])


def test_an_aborted_sglang_sequence_is_refused() -> None:
    with pytest.raises(ServiceError, match="finish_reason='abort'"):
        client.parse_sglang(sglang_reply({"type": "abort", "message": "too long"}), STOP)


def test_both_requests_carry_ids_and_every_sampling_parameter() -> None:
    ours = client.render_vllm((1, 2), ("</search>",), 7, Sampling(0.5, 3), "policy-x")
    theirs = client.render_sglang((1, 2), ("</search>",), 7, Sampling(0.5, 3))
    parameters = theirs["sampling_params"]
    assert ours["prompt"] == theirs["input_ids"] == [1, 2]
    assert ours["max_tokens"] == parameters["max_new_tokens"] == 7
    assert ours["stop"] == parameters["stop"] == ["</search>"]
    assert ours["include_stop_str_in_output"] is parameters["no_stop_trim"] is True
    assert ours["skip_special_tokens"] is parameters["skip_special_tokens"] is False
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        assert ours[name] == parameters[name]
    assert ours["seed"] == parameters["sampling_seed"]


def test_seeds_follow_prompt_and_seed_and_are_absent_when_greedy() -> None:
    def seed(ids: tuple[int, ...], sampling: Sampling) -> int | None:
        return client.render_vllm(ids, (), 1, sampling, "m")["seed"]

    assert seed((1, 2), Sampling(0.0, 1)) is None
    assert seed((1, 2), Sampling(1.0, 1)) == seed((1, 2), Sampling(1.0, 1))
    assert len({seed((1, 2), Sampling(1.0, 1)), seed((12,), Sampling(1.0, 1)), seed((1, 2), Sampling(1.0, 2))}) == 3
