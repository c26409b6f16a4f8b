"""ONNX's own tests of its two cross-entropy operators: the cases its package generates for every backend.

The reference implementations behind them are the package's, in float32 NumPy; classes lie along axis 1.
"""

import numpy as np
import onnx.helper
import pytest
from onnx.backend.test.case import node
from onnx.backend.test.case.node import negativeloglikelihoodloss, softmax_cross_entropy_loss  # noqa: F401  fill the list

import ce_fast as ce

LOSSES = {"SoftmaxCrossEntropyLoss": ce.CrossEntropyLoss, "NegativeLogLikelihoodLoss": ce.NLLLoss}
# `collect_testcases` would import all operators; "_expanded" are the same numbers through a graph of other operators
CASES = {
    case.name.removeprefix("test_"): case
    for case in node._NodeTestCases
    if "_expanded" not in case.name and case.model.graph.node[0].op_type in LOSSES
}


def operator(case):
    """(class of the loss, its attributes, inputs by name, outputs by name)."""
    op = case.model.graph.node[0]
    (inputs, outputs), *more = case.data_sets
    assert not more
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in op.attribute}
    attributes["reduction"] = attributes.get("reduction", b"mean").decode()
    return LOSSES[op.op_type], attributes, inputs, outputs


def test_all_of_onnx_cases_are_here():
    """Of each operator: every reduction, with weights and without, ignored rows, two to seven dimensions."""
    for loss, at_least in ((ce.CrossEntropyLoss, 34), (ce.NLLLoss, 18)):
        cases = [parts for parts in map(operator, CASES.values()) if parts[0] is loss]
        assert len(cases) >= at_least
        assert {a["reduction"] for _, a, _, _ in cases} == {"mean", "sum", "none"}
        assert {len(inputs) for _, _, inputs, _ in cases} == {2, 3}
        assert {"ignore_index" in a for _, a, _, _ in cases} == {True, False}
        assert {inputs[0].ndim for _, _, inputs, _ in cases} >= {2, 3, 4, 5, 7}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_onnx_node_case_is_reproduced(variant, case):
    loss, attributes, (logits, target, *weight), (expected, *log_prob) = operator(case)
    value = loss(*weight, class_axis=1, **attributes)(logits, target)
    assert np.shape(value) == np.shape(expected)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=case.atol)
    if log_prob:
        np.testing.assert_allclose(ce.log_softmax(logits, class_axis=1), *log_prob, rtol=1e-5, atol=case.atol)
        assert loss is ce.CrossEntropyLoss
        np.testing.assert_allclose(
            ce.NLLLoss(*weight, class_axis=1, **attributes)(*log_prob, target), expected, rtol=1e-5, atol=case.atol
        )
