"""Losses, targets and centres against numbers recorded from the public DINOv2."""

import numpy as np
import pytest
import torch

from dinov2.loss import Center, cross_entropy, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from tests.conftest import golden

CLOSE = dict(atol=1e-5, rtol=1e-5)


def tensors(name):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in golden(name).items()}


def test_dino_targets_centre_and_sinkhorn():
    r = tensors("dino_loss.npz")
    temp = float(r["teacher_temp"])
    center = Center((1, r["teacher1"].shape[1]))
    np.testing.assert_allclose(center.softmax(r["teacher1"], temp), r["probs1"], **CLOSE)
    center.observe(r["teacher1"])
    center.update()
    np.testing.assert_allclose(center.center, r["center_after_teacher1"], **CLOSE)
    np.testing.assert_allclose(center.softmax(r["teacher2"], temp), r["probs2"], **CLOSE)
    np.testing.assert_allclose(sinkhorn_knopp(r["teacher2"], temp), r["sinkhorn_teacher2"], **CLOSE)


def test_centre_of_micro_batches_is_that_of_the_batch():
    logits = torch.randn(10, 6)
    whole, parts = Center((1, 6)), Center((1, 6))
    whole.observe(logits)
    parts.observe(logits[:3])
    parts.observe(logits[3:])
    whole.update()
    parts.update()
    torch.testing.assert_close(whole.center, parts.center)


def test_dino_loss_and_gradient():
    r = tensors("dino_loss.npz")
    student = r["student"].requires_grad_()
    batch = len(r["probs2"]) // 2
    crops = student.view(-1, batch, student.shape[1])
    loss = dino_loss(crops, [r["probs2"].view(2, batch, -1)])
    loss.backward()
    np.testing.assert_allclose(loss.detach(), r["loss"], rtol=1e-5)
    np.testing.assert_allclose(student.grad, r["student_grad"], **CLOSE)


def test_ibot_loss_gradient_centre_and_sinkhorn():
    r = tensors("ibot_loss.npz")
    temp, teacher = float(r["teacher_temp"]), r["teacher"][0]
    center = Center((1, 1, teacher.shape[1]))
    np.testing.assert_allclose(center.softmax(teacher, temp), r["probs"], **CLOSE)
    center.observe(teacher)
    center.update()
    np.testing.assert_allclose(center.center, r["center_after"], **CLOSE)
    np.testing.assert_allclose(sinkhorn_knopp(teacher, temp), r["sinkhorn"], **CLOSE)
    student = r["student"].requires_grad_()
    loss = ibot_loss(student, [r["probs"]], r["masks_weight"], crops=len(r["masks"]))
    loss.backward()
    np.testing.assert_allclose(loss.detach(), r["loss"], rtol=1e-5)
    np.testing.assert_allclose(student.grad, r["student_grad"], **CLOSE)


def test_koleo_and_gradient():
    r = tensors("koleo_loss.npz")
    x = r["input"].requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    np.testing.assert_allclose(loss.detach(), r["loss"], rtol=1e-5)
    np.testing.assert_allclose(x.grad, r["input_grad"], **CLOSE)


def test_koleo_of_one_image_is_zero_without_gradient():
    x = torch.randn(1, 8, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == 0.0 and x.grad.abs().max() == 0.0


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_the_gradient_takes_the_memory_of_consumed_targets_of_its_type(kept):
    torch.manual_seed(0)
    student = torch.randn(6, 40, requires_grad=True)
    targets = [torch.randn(6, 40).softmax(dim=1).to(kept) for _ in range(2)]
    weights, places = torch.rand(2, 6), []
    expected = -(torch.stack(targets).float() * (student / 0.1).log_softmax(dim=1)).sum(dim=2)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), student)
    logits = student.clone()
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    loss = (cross_entropy(logits, targets, 0.1, consumed=True) * weights).sum()
    (found,) = torch.autograd.grad(loss, student, retain_graph=True)
    torch.testing.assert_close(found, wanted)
    if kept == student.dtype:
        assert places == [targets[0].data_ptr()]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # they are used up
            loss.backward()
