"""The toy checkpoint: Moshi's files and structure at a small size, read by the package's own loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from moshi.models import loaders

from inlay.moshi.toy import ToySizes, write_toy_checkpoint
from inlay.moshi.weights import MoshiWeightsError, load_checkpoint

SIZES = ToySizes(dim=32, num_layers=2, num_heads=2, context=8, card=16, depformer_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"), dtype=torch.float32, sizes=SIZES)


def test_has_moshis_streams_delays_and_modules(folder: Path) -> None:
    lm = load_checkpoint(folder, dtype=torch.float32).lm
    assert (lm.num_codebooks, lm.n_q, lm.dep_q, lm.card) == (17, 16, 8, 16)
    assert lm.delays == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    config = json.loads((folder / "config.json").read_text())
    assert set(loaders._lm_kwargs) <= set(config)
    gating = lm.transformer.layers[1].gating
    assert type(gating).__name__ == "ActivationGating"
    # Moshi's F is 2/3 of 4.125 D: the gating halves what it makes of it.
    assert gating.linear_out.weight.shape == (32, int(4.125 * 32) * 2 // 3)
    assert type(lm.transformer.layers[0].norm1).__name__ == "RMSNorm"
    assert lm.transformer.rope is not None
    assert len(lm.depformer.layers[0].gating) == 8


def test_the_loader_gives_back_the_weights_that_were_drawn(folder: Path, tmp_path: Path) -> None:
    again = write_toy_checkpoint(tmp_path, dtype=torch.float32, sizes=SIZES)
    for name in ("config.json", "mimi_config.json", "tokenizer_spm_toy.model", "model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
    first, second = load_checkpoint(folder, dtype=torch.float32), load_checkpoint(again, dtype=torch.float32)
    assert first.mimi_hash == second.mimi_hash
    for (name, one), (_, other) in zip(first.mimi.state_dict().items(), second.mimi.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_another_seed_gives_other_weights_and_the_global_generator_is_left_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    other = write_toy_checkpoint(tmp_path, seed=1, dtype=torch.float32, sizes=SIZES)
    assert torch.equal(torch.rand(3), expected)
    assert load_checkpoint(other).mimi_hash != load_checkpoint(folder).mimi_hash
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_mimis_codes_depend_on_the_sound(folder: Path) -> None:
    mimi = load_checkpoint(folder).mimi
    assert (mimi.frame_rate, mimi.sample_rate, mimi.frame_size, mimi.num_codebooks) == (12.5, 24_000, 1_920, 8)
    generator = torch.Generator().manual_seed(3)
    sounds = torch.randn(2, 1, 24_000 * 4, generator=generator) * torch.linspace(0, 1, 24_000 * 4)
    codes = mimi.encode(sounds)
    assert codes.shape == (2, 8, 50)
    assert all(len(level.unique()) >= 8 for level in codes.transpose(0, 1))
    assert not torch.equal(codes[0], codes[1])


def test_the_tokenizer_has_moshis_special_ids_and_never_yields_them(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    tokenizer = checkpoint.text_tokenizer
    assert [tokenizer.id_to_piece(token) for token in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (checkpoint.end_of_text_padding_id, checkpoint.text_padding_id) == (0, 3)
    assert checkpoint.lm_config["text_card"] == tokenizer.get_piece_size()
    for text in ("hello", "Übergrößenträger", "東京", "1,984"):
        tokens = tokenizer.encode(text)
        assert min(tokens) > 3, text
        assert tokenizer.decode(tokens) == text


def test_the_words_of_made_conversations_are_few_pieces(folder: Path) -> None:
    sentence = "please remember the number of the office is seven three four nine"
    words = sentence.split()
    pieces = [len(load_checkpoint(folder).text_tokenizer.encode(word)) for word in words]
    assert sum(pieces) <= 1.5 * len(words)


def test_parts_are_built_at_first_use_and_overrides_reach_the_model(folder: Path) -> None:
    checkpoint = load_checkpoint(folder, dtype=torch.float32)
    assert not {"lm", "mimi", "text_tokenizer"} & set(vars(checkpoint))
    assert checkpoint.lm is checkpoint.lm
    assert checkpoint.load_lm(context=5).transformer.layers[0].self_attn.context == 5


def test_a_file_that_is_missing_or_broken_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MoshiWeightsError, match=r"nowhere: no such folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MoshiWeightsError, match=r"model\.safetensors is missing \(and there is no config\.json\)"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"mimi_name": "mimi.safetensors"}))
    with pytest.raises(MoshiWeightsError, match=r"model\.safetensors is missing \(moshi_name in .*config\.json\)"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MoshiWeightsError, match=r"config\.json: not JSON"):
        load_checkpoint(tmp_path)


def test_a_folder_without_config_is_the_first_releases_7b(tmp_path: Path) -> None:
    for name in (loaders.MOSHI_NAME, loaders.MIMI_NAME, loaders.TEXT_TOKENIZER_NAME):
        (tmp_path / name).touch()
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.lm_config == loaders._lm_kwargs
    assert (checkpoint.codebooks, checkpoint.info.moshi_weights) == (8, tmp_path / loaders.MOSHI_NAME)
