"""DDP and FSDP2: a step in two gloo processes is the step of one process on the mean of both losses."""

import pytest
import torch

from tests.parallel_worker import gradients, prompt, step
from tests.tiny_models import mmer_model
from tests.two_processes import in_two_processes


@pytest.mark.parametrize("task", ["ddp", "fsdp"])
def test_a_training_step_is_that_of_the_mean(tmp_path, task):
    """Both processes have other samples; the gradients are those of the mean of both losses."""
    model = mmer_model().train()
    model.save_pretrained(tmp_path)
    losses = torch.stack([step(model, prompt(seed)) for seed in range(2)])
    want = {name: grad / 2 for name, grad in gradients(model).items()}
    assert any(name.endswith("delta") for name in want)
    masks = {name: p for name, p in model.named_parameters() if name.endswith("masks")}
    for found in in_two_processes(task, tmp_path):
        torch.testing.assert_close(found["loss"], losses.mean(), rtol=1e-5, atol=1e-6)
        assert want.keys() <= found.keys()
        for name, grad in want.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5)
        for name, mask in masks.items():
            assert name not in found or torch.equal(found[name], mask.data)
