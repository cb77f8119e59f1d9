"""FLoRA's promises: the base LLM bitwise where it must be, rows that do not feel each other, W that never changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmchat.conversation import MODALITIES, Conversation, MediaRef, Turn
from mmchat.models.fusion import merge
from mmchat.models.llm import SEGMENTS, decoder_of
from tests import models, tiny

SCOPES = ["segment", "own_tokens"]


def _flora(scope="segment", **more):
    return {"kind": "flora", "rank": 4, "alpha": 8, "scope": scope, **more}


def _text(*questions):
    return [Conversation((Turn("user", (q,)), Turn("assistant", ("Fine.",)))) for q in questions]


def _base_logits(folder, batch):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=SEGMENTS).eval()
    with torch.no_grad():
        return base(input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False).logits


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "fusion", [_flora(), _flora("own_tokens"), {"kind": "early"}, {"kind": "full"}, {"kind": "late", "num_heads": 4}],
    ids=lambda f: f["kind"] + f.get("scope", ""),
)  # fmt: skip
@pytest.mark.parametrize("kind", list(tiny.LLMS))
def test_without_any_modality_the_output_is_the_base_llms_bitwise(tiny_folder, tmp_path, kind, fusion, training):
    folder = models.llm_folder(tmp_path, kind)
    model, template = models.build(models.config(llm={"pretrained": folder}, fusion=fusion))
    models.wake(model)  # trained or not: closed gates are closed
    model.train(training)
    batch = models.pack(template, _text("How are you?"))
    with torch.no_grad():
        assert torch.equal(model.logits(batch), _base_logits(folder, batch))


@pytest.mark.parametrize("scope", SCOPES)
def test_at_step_0_the_adapted_llm_is_the_base_llm_bitwise(tiny_folder, scope):
    adapted, template = models.build(models.config(fusion=_flora(scope)))
    plain, _ = models.build(models.config(fusion={"kind": "early"}))
    plain.connectors.load_state_dict(adapted.connectors.state_dict())
    pack = models.pack(template)
    with torch.no_grad():
        assert torch.equal(adapted.logits(pack), plain.logits(pack))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_conversation_does_not_feel_what_its_neighbours_have(tiny_folder, scope):
    model, template = models.build(models.config(fusion=_flora(scope)))
    models.wake(model)
    text = _text("How are you today?")
    with torch.no_grad():
        alone = model.logits(models.pack(template, text))
        length = alone.shape[1]
        for neighbours in ([models.conversations()[0]], models.conversations()):
            together = model.logits(models.pack(template, text + neighbours))
            torch.testing.assert_close(together[:, :length], alone, rtol=1e-5, atol=1e-5)


def test_a_pair_of_a_lower_rank_is_the_same_pair_with_zeros(tiny_folder):
    """Each modality keeps its own channels where ranks differ, and all are scaled alike."""
    small, template = models.build(models.config(fusion=_flora(ranks={"video": 1, "audio": 3})))
    models.wake(small)
    whole, _ = models.build(models.config(fusion=_flora()))
    state = whole.state_dict()
    for name, value in small.state_dict().items():
        padded = torch.zeros_like(state[name])
        padded[tuple(slice(size) for size in value.shape)] = value
        state[name] = padded
    whole.load_state_dict(state)
    pack = models.pack(template)
    with torch.no_grad():
        torch.testing.assert_close(small.logits(pack), whole.logits(pack), rtol=1e-5, atol=1e-5)


def test_gates_of_the_two_scopes(tiny_folder):
    _, segment = models.build(models.config(fusion=_flora()))
    _, own = models.build(models.config(fusion=_flora("own_tokens")))
    audio = MODALITIES.index("audio")
    conversation = models.conversations()[1]
    whole, part = segment.render(conversation), own.render(conversation)
    assert (whole.gates[:, audio] == 1).all() and whole.gates.sum() == len(whole)
    (item,) = part.media
    expected = torch.zeros(len(part))
    expected[item.start : item.start + item.num_placeholders] = 1
    assert part.gates[:, audio].tolist() == expected.tolist() and part.gates.sum() == item.num_placeholders > 0


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_only_the_present_modality_matters(tiny_folder, modality):
    """Wrecking the other modalities' pairs changes nothing; wrecking its own does."""
    model, template = models.build(models.config(fusion=_flora()))
    models.wake(model)
    batch = models.pack(template, [models.conversations()[["image", "audio", "video"].index(modality)]])

    def wreck(is_own):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".fusion_b_" in name and name.endswith(modality) == is_own:
                    parameter += 1.0

    with torch.no_grad():
        before = model.logits(batch)
        wreck(is_own=False)
        torch.testing.assert_close(model.logits(batch), before, rtol=0, atol=0)
        wreck(is_own=True)
        assert (model.logits(batch) - before).abs().max() > 0.1


def test_merging_one_modality_is_exact(tiny_folder):
    model, template = models.build(models.config(fusion=_flora()))
    models.wake(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fusion_b_" in name and not name.endswith("_image"):
                parameter.zero_()
    batch = models.pack(template, [models.conversations()[0]])
    with torch.no_grad():
        before = model.logits(batch)
        merge(decoder_of(model.llm), "image")
        model.gates = None
        torch.testing.assert_close(model.logits(batch), before, rtol=1e-5, atol=1e-5)
    assert not any("fusion" in name for name, _ in model.named_parameters())


def test_merging_is_refused_where_presence_matters(tiny_folder):
    model, _ = models.build(models.config(fusion=_flora()))
    models.wake(model)
    with pytest.raises(ValueError, match="depend on which modalities are present"):
        merge(decoder_of(model.llm), "image")


def test_dropouts_are_the_absent_case(tiny_folder):
    import random

    fusion = _flora(modality_dropout={"image": 1.0}, adapter_dropout={"audio": 1.0})
    _, template = models.build(models.config(fusion=fusion))
    image, audio = models.conversations()[0], models.conversations()[1]
    without = Conversation(
        tuple(
            replace(t, parts=tuple(replace(p, data=None) if isinstance(p, MediaRef) else p for p in t.parts))
            for t in image.turns
        )
    )
    dropped, absent = template.render(image, rng=random.Random(0)), template.render(without)
    assert dropped.token_ids == absent.token_ids and dropped.labels == absent.labels and not dropped.media
    closed, open_ = template.render(audio, rng=random.Random(0)), template.render(audio)
    assert closed.token_ids == open_.token_ids and len(closed.media) == 1
    assert closed.gates.sum() == 0 < open_.gates.sum()
    assert template.render(image).media  # without an rng, as in inference, nothing is dropped


def test_unknown_target_names_the_layers_there_are(tiny_folder):
    with pytest.raises(ValueError, match=r"q_proj"):
        models.build(models.config(fusion=_flora(targets=["qkv"])))


def test_trainable_share_of_a_real_width():
    """At rank 16, three pairs on every linear layer of SmolLM2-135M's shapes are 1-12 % of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mmchat.models.fusion import FLoRAConfig, adapt

    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=100)  # fmt: skip
    llm = LlamaForCausalLM(config)
    base = sum(p.numel() for p in llm.model.layers.parameters())
    adapt(llm.model, FLoRAConfig(rank=4), MODALITIES)
    pairs = sum(p.numel() for n, p in llm.named_parameters() if "fusion" in n)
    assert 0.01 < pairs / base < 0.05
