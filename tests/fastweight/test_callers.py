"""However a model is called (by threads, behind an encoder, with masks and positions of any kind), the memory reads
what the model does, or says that it cannot."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import inlay
from inlay import AttachError, FastWeightConfig, StateError
from tests.closeness import assert_close, relative_error
from tests.fastweight.families import BY_NAME

LLAMA = BY_NAME["llama"]
IDS = LLAMA.tokens(2, 22)


def config(projection: str | None = None, **changes: Any) -> FastWeightConfig:
    return FastWeightConfig(layers="all", chunk_size=4, eta=1.0, init={"normal": 0.5}, projection=projection, **changes)


@pytest.mark.parametrize("target", ["embeddings", "hidden"])
def test_threads_run_forwards_of_one_model_side_by_side(target: str) -> None:
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config(target=target))
    batches = [LLAMA.tokens(1, 18 + 2 * thread, seed=thread) for thread in range(4)]
    with torch.no_grad():
        expected = [model(input_ids=ids, use_cache=False).logits for ids in batches]
    wrong: list[Any] = []

    @torch.no_grad()
    def run(thread: int) -> None:
        for _ in range(15):
            try:
                assert_close(model(input_ids=batches[thread], use_cache=False).logits, expected[thread], 1e-6)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def bart() -> Any:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    inner = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=64, d_model=32, max_position_embeddings=64, init_std=0.3, **sizes, **heads, **inner
        )
    )


def t5gemma() -> Any:
    part = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    part |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(encoder=dict(part), decoder=dict(part), vocab_size=64)
    )


@pytest.mark.parametrize(
    ("make", "projection"), [(bart, "model.decoder.layers.{layer}.fc2"), (t5gemma, None)], ids=["bart", "t5gemma"]
)
def test_an_encoders_padding_is_not_the_decoders(make: Any, projection: str | None) -> None:
    torch.manual_seed(0)
    model = make().eval()
    memory = inlay.attach(model, config(projection))
    assert "Decoder" in type(memory.decoder.module).__name__
    read, written = torch.randint(3, 60, (2, 30)), torch.randint(3, 60, (2, 17))
    mask = torch.ones_like(read)
    mask[1, 20:] = 0

    def logits(rows: slice, length: int, **masks: Tensor) -> Tensor:
        given = {"input_ids": read[rows, :length], "decoder_input_ids": written[rows]}
        with torch.no_grad():
            found: Tensor = model(**given, **masks, use_cache=False).logits
        return found

    both, alone = logits(slice(2), 30, attention_mask=mask), logits(slice(1, 2), 20)
    assert_close(both[1:], alone, 1e-5)
    assert_close(logits(slice(2), 12, attention_mask=mask[:, :12])[:1], logits(slice(1), 12), 1e-5)  # a shorter mask
    padded = torch.ones_like(written)
    padded[1, :5] = 0
    assert (
        relative_error(logits(slice(2), 30, attention_mask=mask, decoder_attention_mask=padded)[1, 5:], both[1, 5:])
        > 0.001
    )
    with memory.disabled():
        assert relative_error(logits(slice(1, 2), 20), alone) > 0.01


def test_documents_are_read_off_the_text_positions_of_a_vision_language_model() -> None:
    """Qwen-VL takes positions ``[4, B, T]`` for packed rows: those in the text, then time, height and width."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_heads": 2}
    vision |= {"patch_size": 14, "deepstack_visual_indexes": [0]}
    model = transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=79)
    ).eval()
    inlay.attach(model, config())
    ids = torch.randint(3, 60, (1, 20))
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None].expand(4, 1, 20)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits[:, 9:]
        assert_close(packed, model(ids[:, 9:], use_cache=False).logits, 1e-5)


def test_padding_is_found_in_a_mask_that_is_passed_by_place() -> None:
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config())
    mask = torch.ones_like(IDS)
    mask[:, :6] = 0
    with torch.no_grad():
        alone = model(IDS[:, 6:], use_cache=False).logits
        assert_close(model(IDS, mask, use_cache=False).logits[:, 6:], alone, 1e-5)
        with pytest.raises(ValueError, match="attention_mask tells of 10 tokens and the call has 22"):
            model(IDS, mask[:, :10], use_cache=False)


def test_a_mask_that_hides_padding_is_pointed_out_once() -> None:
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config())
    causal = torch.ones(22, 22, dtype=torch.bool).tril()[None, None]
    with pytest.warns(UserWarning, match=r"attention mask is not \[B, T\].*pass document_ids with -1 there"):
        model(IDS, causal, use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS, causal, use_cache=False)
        model(IDS, causal, document_ids=torch.zeros_like(IDS), use_cache=False)
        model(IDS, use_cache=False)


def test_a_projection_that_is_not_the_one_that_runs_is_refused() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"])
    model = peft.get_peft_model(LLAMA.make(), lora)
    keys = set(model.state_dict())
    with pytest.raises(
        AttachError, match=r"block 0 is inside a ModulesToSaveWrapper.*Leave the MLP out of PEFT's modules_to_save"
    ):
        inlay.attach(model, LLAMA.config())
    assert set(model.state_dict()) == keys
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config())
    with pytest.raises(RuntimeError, match="leave what holds a memory out of PEFT's modules_to_save"):
        peft.get_peft_model(model, lora)(input_ids=IDS, use_cache=False)


def test_a_block_that_stands_in_the_model_twice_is_refused() -> None:
    model = LLAMA.make()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(AttachError, match="block 0 stands in the model more than once"):
        inlay.attach(model, LLAMA.config())
    inlay.attach(model, LLAMA.config(layers=[2]))


@pytest.mark.parametrize("what", [None, "gpt2"])
def test_only_a_model_can_get_a_memory(what: Any) -> None:
    with pytest.raises(AttachError, match="attach takes a model that is loaded"):
        inlay.attach(what, LLAMA.config())


def test_a_method_that_works_around_the_memory_is_pointed_out() -> None:
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config())
    wrapped = peft.get_peft_model(model, peft.HRAConfig(r=2, target_modules=["down_proj"]))
    with pytest.warns(UserWarning, match="no layer of the memory ran in this forward"):
        wrapped(input_ids=IDS, use_cache=False)


def test_generating_without_a_cache_in_a_session_is_refused() -> None:
    """Each step of it gives the whole text again."""
    model = LLAMA.make()
    memory = inlay.attach(model, LLAMA.config())
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    session = memory.session(2)
    with session, pytest.raises(StateError, match=r"begins with all tokens of the last one.*use_cache=True"):
        model.generate(IDS, use_cache=False, **options)
    assert session.tokens_read.tolist() == [22, 22]
    session.reset()
    with session:
        model.generate(IDS, **options)
    assert session.tokens_read.tolist() == [25, 25]
    session.reset()
    session.step(IDS[:, :10])
    session.reset([0, 1])
    session.step(IDS[:, :11])
    assert session.tokens_read.tolist() == [11, 11]
