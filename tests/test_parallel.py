"""Tensor parallel: two gloo processes answer as one does, on every route and with every part that a route has."""

import pytest
import torch

from tests.parallel_worker import answers
from tests.tiny_models import mmer_config, mmer_model, text_config
from tests.two_processes import in_two_processes

CASES = {
    "masks": dict(decoupling={"kind": "mask", "scale": "none", "rank": 0}, expert_tensors=[]),
    "paper": dict(decoupling={"kind": "paper", "scale": "none", "rank": 0}, expert_tensors=[]),
    "merged": dict(decoupling={"kind": "none", "scale": "none", "rank": 0}, expert_tensors=[]),
    "tensor-scales": dict(decoupling={"kind": "mask", "scale": "tensor", "rank": 0}, expert_tensors=[]),
    "row-scales": dict(decoupling={"kind": "mask", "scale": "row", "rank": 0}, expert_tensors=[]),
    "corrections": dict(decoupling={"kind": "exact", "scale": "none", "rank": 4}, expert_tensors=[]),
    "odd-corrections": dict(decoupling={"kind": "exact", "scale": "none", "rank": 3}, expert_tensors=[]),
    "norms": dict(decoupling={"kind": "mask", "scale": "none", "rank": 0}),
    "all": dict(),
    "biases": dict(text=text_config("qwen2")),
}
REFUSED = {
    "odd-bytes": (dict(text=text_config(intermediate_size=30), expert_tensors=[]), "down_proj has 30 inputs: 2 ranks"),
    "row-bias": (dict(text=text_config(attention_bias=True)), "o_proj is divided over its inputs and has a bias"),
}


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """{case: what one process answers}, and the same of each of two processes."""
    folder, want = tmp_path_factory.mktemp("parallel"), {}
    for case, (values, _) in REFUSED.items():
        mmer_model(mmer_config(**values)).save_pretrained(folder / case)
    for case, values in CASES.items():
        model = mmer_model(mmer_config(**values))
        model.save_pretrained(folder / case)
        want[case] = answers(model)
    return want, in_two_processes("tp", folder)


@pytest.mark.parametrize("case", CASES)
def test_tensor_parallel_answers_are_those_of_one_process(parallel, case):
    want, ranks = parallel
    for found in ranks:
        assert isinstance(found[case], dict), found[case]
        for name, value in want[case].items():
            torch.testing.assert_close(found[case][name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_divided_is_refused(parallel, case):
    for found in parallel[1]:
        assert isinstance(found[case], str) and REFUSED[case][1] in found[case], found[case]
