"""Small inputs that once gave wrong numbers in silence, or a traceback: models, tokenizers, labels, launchers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, WriteRecipe, in_process, launch, refuse, succeed
from families import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from atlantis_ds.cluster.ranks import Ranks, find_place
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Model, Train
from atlantis_ds.data.prepare import prepare
from atlantis_ds.errors import InputError
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.frozen import cgroup_room
from atlantis_ds.lm.likelihood import cut_labels, score_choices
from atlantis_ds.lm.load import load_model, load_tokenizer, sharded_at_load
from atlantis_ds.plan.scoring import sizes_of_folder
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.train.checkpoint import adam_moments, save_model
from atlantis_ds.train.deepspeed_config import deepspeed_config
from atlantis_ds.train.engine import add_lora, four_bits

CONFIG = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=64, vocab_size=96)
END = "</s>"


def words(ends_every_text: bool = False, template: str | None = None) -> Any:
    """A tokenizer of a few English words; any other word is unknown to it."""
    known = ["<unk>", END, "ask", "say", "yes", "no", "user", "assistant", "system"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends_every_text:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=END)
    fast.chat_template = template
    return fast


# --- models that are saved


@pytest.fixture()
def alone() -> Iterator[None]:
    """A process group of one rank, which DeepSpeed wants before it gathers a weight."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["bart", "gpt_neo", "llama", "t5"])
def test_what_is_saved_equals_the_whole_state(name: str, tmp_path: Path) -> None:
    """Buffers are part of it: BART adds its `final_logits_bias` to every logit, and `save_model` once lost it."""
    model = tiny(name)
    save_model(SimpleNamespace(module=model), words(), tmp_path / "saved", Ranks.alone())
    found = load_model(Model(model_name_or_path=str(tmp_path / "saved")), "float32").state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.usefixtures("alone")
def test_the_router_bias_of_experts_is_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    (bias,) = (buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    bias.normal_()
    save_model(SimpleNamespace(module=model), words(), tmp_path / "saved", Ranks.alone())
    found = load_model(Model(model_name_or_path=str(tmp_path / "saved")), "float32").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())


# --- labels


def test_labels_that_are_the_same_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="labels '是' and '否' have the same tokens"):
        Encoder(words(), CONFIG, ["yes", "是", "否"])


@pytest.mark.ranks
def test_labels_that_only_case_tells_apart_cannot_be_generated(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    data = {"task": "classification"}
    for split in ("train", "test"):
        rows = [{"text": f"{split} {at}", "label": ("Yes", "yes", "no")[at % 3]} for at in range(12)]
        data[split] = str(tmp_path / f"{split}.jsonl")
        Path(data[split]).write_text("\n".join(map(json.dumps, rows)))
    changes = {"data": data, "evaluate.method": "generate", "arms": {"sft": {"weights": {"formula": "uniform"}}}}
    refuse(
        launch("local", 1, "run", tiny_recipe(tmp_path, changes)), "'Yes', 'yes'", "differ only in case", "method: rank"
    )


def test_many_labels_are_cut_into_several_trees() -> None:
    model, prompts = tiny("llama"), [[5, 6, 7], [8, 9]]
    labels = [[3 + at % 90, 3 + at // 90, 4] for at in range(400)]
    parts = cut_labels(labels)
    assert len(parts) == 3 and [label for part in parts for label in part] == labels
    assert max(sum(map(len, part)) for part in parts) <= 512
    every = score_choices(model, prompts, labels, 1, 4096)
    for some in ([0, 1, 200], [399]):
        alone = score_choices(model, prompts, [labels[at] for at in some], 1, 4096)
        torch.testing.assert_close(every[:, some], alone, rtol=0, atol=1e-4)


def test_rows_of_two_kinds_in_one_data_set(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]}
    for name, row in (("train-1", {"prompt": "ask", "response": "say"}), ("train-2", chat)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    data = {"task": "response", "train": str(tmp_path / "train-*.jsonl")}
    recipe = load_recipe(tiny_recipe(tmp_path, {"data": data, "weights": {"formula": "reference"}}))
    with pytest.raises(InputError, match=r"train-2.jsonl:1: the row has messages, but the rows before it have prompt"):
        prepare(recipe, RunFolder(tmp_path / "run"))


# --- adapters


def test_misspelt_lora_targets_are_named() -> None:
    for names in (["q_proj", "v_porj"], ["v_porj"]):
        with pytest.raises(InputError, match="no module 'v_porj'; similar: v_proj"):
            add_lora(tiny("llama"), Train(mode="lora", lora_target_modules=names), None)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_lora_on_a_tied_head_is_refused(target: str) -> None:
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    train = Train(mode="lora", lora_target_modules=["q_proj", target])
    with pytest.raises(InputError, match=f"{target}: head and embedding are tied"):
        add_lora(model, train, None)
    add_lora(tiny("llama"), train, None)  # not tied


def test_moments_of_an_8_bit_optimizer_are_read() -> None:
    """bitsandbytes has other names for them: the check after a resume once compared 0 with 0."""
    states = {at: {"state1": torch.full((4,), 3, dtype=torch.uint8), "state2": torch.ones(4)} for at in range(2)}
    engine = SimpleNamespace(optimizer=SimpleNamespace(state=states), zero_optimization_stage=lambda: 0)
    assert adam_moments(engine, Ranks.alone()) == [24.0, 8.0]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stage", [2, 3])
def test_4_bit_weights_load_under_zero_3(stage: int, base_model: Path) -> None:
    """Real bitsandbytes. With a device map transformers refuses it; training in this mode needs a GPU."""
    from bitsandbytes.nn import Linear4bit

    train = Train(mode="qlora", dtype="float32", bnb_4bit_quant_storage="float32")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    with sharded_at_load(config):
        lm = load_model(
            Model(model_name_or_path=str(base_model)), "float32", four_bits(train, torch.device("cpu"), stage)
        )
    assert any(isinstance(module, Linear4bit) for module in lm.modules())


# --- tokenizers


def test_no_end_token_between_prompt_and_target() -> None:
    (pair,) = Encoder(words(ends_every_text=True), CONFIG, ["yes", "no"]).pairs(["ask"], ["no"])
    assert (pair.prompt, pair.label, pair.eos) == ([2], [5], 1)


def test_a_template_that_refuses_the_turns_is_one_line() -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    turns = json.dumps([{"role": "user", "content": "ask"}]), json.dumps([{"role": "assistant", "content": "say"}])
    encoder = Encoder(words(template=template), CONFIG, chat=True)
    with pytest.raises(InputError, match="it rejects the turns: system first"):
        list(encoder.pairs([turns[0]], [turns[1]]))


def test_tokens_beyond_the_embedding_are_refused() -> None:
    small = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=64, vocab_size=5)
    with pytest.raises(InputError, match=r"example a: token 5 .* beyond the model's 5 embeddings"):
        Encoder(words(), small).refuse_foreign_tokens(Encoded([2], [5], 1), "a")


def test_a_decoder_without_a_start_is_refused() -> None:
    config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=None, vocab_size=9)
    with pytest.raises(InputError, match="no decoder_start_token_id"):
        Encoder(words(), config)


@pytest.mark.parametrize(
    "files, said",
    [
        ({"tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'}, "no fast version"),
        ({"tokenizer.model": "?", "config.json": '{"model_type": "llama"}'}, "tokenizer.json"),
    ],
)
def test_tokenizers_without_a_fast_form_are_one_line(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        load_tokenizer(Model(model_name_or_path=str(tmp_path)))


def test_a_sentencepiece_model_alone_is_enough(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("\n".join(f"the {noun} sees the {other}" for noun in ("cat", "dog") for other in ("owl", "fox")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=30, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(Model(model_name_or_path=str(tmp_path)))
    ids = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1 and tokenizer.decode(ids) == "the fox"


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b"", b"[]"])
def test_check_survives_weights_that_are_none(content: bytes, base_model: Path, tmp_path: Path) -> None:
    """What a clone without Git LFS holds, say; it is refused where it is loaded."""
    (tmp_path / "config.json").write_bytes((base_model / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    assert sizes_of_folder(base_model) is not None
    assert sizes_of_folder(tmp_path) is None


# --- the machine


@pytest.mark.ranks
def test_a_deepspeed_config_without_zero_is_stage_0(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    config = json.loads((ROOT / "ds_configs" / "zero0.json").read_text())
    del config["zero_optimization"]
    (tmp_path / "plain.json").write_text(json.dumps(config))
    recipe = tiny_recipe(tmp_path, {"train.deepspeed": str(tmp_path / "plain.json"), "train.num_train_epochs": 1})
    in_process(recipe, "prepare")
    assert "5/5 steps" in succeed("local", 1, "train", recipe, "--arm", "sft")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"fp16": {"enabled": True}}, "remove `fp16`; the recipe sets it"),
        (
            {"checkpoint": {"writer": {"decoupled": True}}},
            "`checkpoint.writer.decoupled` writes while training continues",
        ),
    ],
)
def test_deepspeed_settings_that_would_do_harm_are_refused(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    config = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=re.escape(said)):
        deepspeed_config(Train(deepspeed=str(tmp_path / "own.json")), world_size=1)


@pytest.mark.parametrize(
    "line, files, room",
    [
        ("0::/job/step", {"job/memory.max": "900", "job/memory.current": "300", "job/step/memory.max": "max"}, 600),
        ("0::/job/step", {"job/step/memory.max": "50", "job/step/memory.current": "80"}, 0),
        (
            "7:cpu,memory:/job",
            {"memory/job/memory.limit_in_bytes": "900", "memory/job/memory.usage_in_bytes": "1"},
            899,
        ),
        ("0::/", {}, 2**63),
    ],
)
def test_a_jobs_memory_limit_is_seen(line: str, files: dict[str, str], room: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "cgroup").write_text(line + "\n")
    assert cgroup_room(tmp_path, tmp_path / "cgroup") == room


def test_ranks_of_mpich_and_intel_mpi_are_not_all_rank_0() -> None:
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}
    place = find_place({**hydra, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    assert (place.rank, place.world_size, place.local_rank) == (1, 2, 1)
    with pytest.raises(InputError, match="set MASTER_ADDR"):
        find_place(hydra)
    with pytest.raises(InputError, match="by an unknown launcher"):
        find_place({"PMIX_RANK": "1"})
