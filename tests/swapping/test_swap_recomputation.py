"""Gradient checkpointing of swapped models: two views, micro-batches, a teacher in between."""

import contextlib
import warnings

import pytest
import torch
import transformers
from swap_families import batch, make
from torch import nn
from torch.utils.checkpoint import checkpoint

import tridrop

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def swapped(family: str) -> tuple[nn.Module, dict]:
    model = make(family).train()
    tridrop.swap(model)
    # Reentrant checkpoints need an input with a gradient, as PEFT's users know.
    model.enable_input_require_grads()
    return model, batch(family)


def two_views(model, inputs, around):
    """A contrastive step: one encoder, two masks, one loss, one backward."""
    model.zero_grad()
    views = []
    for seed in (1, 2):
        with tridrop.rng(seed):
            views.append(model(**inputs)[0 if "labels" not in inputs else 1])
    loss = nn.functional.cosine_similarity(views[0], views[1], -1).mean()
    with around:
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@KINDS
@pytest.mark.parametrize("family", ["BERT", "ViT", "Llama", "BART"])
def test_two_views_and_one_backward(family, reentrant):
    model, inputs = swapped(family)
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    expected = two_views(model, inputs, contextlib.nullcontext())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    for around in (contextlib.nullcontext(), tridrop.rng(2), tridrop.rng(3)):
        torch.testing.assert_close(two_views(model, inputs, around), expected)


@KINDS
def test_micro_batches_that_are_summed(reentrant):
    """Each forward under its own slice; the masks are those of the whole batch."""
    model, inputs = swapped("BERT")
    inputs = {k: v for k, v in inputs.items() if k != "labels"}

    def step(parts):
        model.zero_grad()
        loss = 0.0
        for part in parts:
            rows = {k: v[part] for k, v in inputs.items()}
            size = len(rows["input_ids"])
            with tridrop.rng(5), tridrop.distributed.batch_slice(part.start, size):
                loss = loss + model(**rows).logits.square().sum()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    whole = len(inputs["input_ids"])
    expected = step([slice(0, whole)])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = step([slice(i, i + 1) for i in range(whole)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@KINDS
def test_modules_of_torch_and_a_teacher(reentrant):
    torch.manual_seed(0)
    student, teacher = (
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).train() for _ in range(2)
    )
    tridrop.swap(student)
    tridrop.swap(teacher)
    x = torch.randn(3, 5, 16)

    def step(run):
        student.zero_grad()
        losses = []
        for seed in (1, 2):
            with tridrop.rng(seed):
                out = run(x.clone().requires_grad_())
            with tridrop.rng(seed + 10), torch.no_grad():
                target = teacher(x)
            losses.append((out - target).square().sum())
        tridrop.dropout(x, 0.5)
        sum(losses).backward()
        return [p.grad.clone() for p in student.parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = step(student)
        found = step(lambda x: checkpoint(student, x, use_reentrant=reentrant))
    torch.testing.assert_close(found, expected)
