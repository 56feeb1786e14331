"""The task input convolution against one ordinary convolution per sample."""

import pytest
import torch
from torch.nn import functional as F

from mtu.models.conv_in import TaskConvIn

COUNTS = (0, 4, 2, 4)  # condition channels of the tasks
IDS = torch.tensor([3, 0, 2, 1, 0])
# A sum over 9 · 8 products in any order: 72 roundings of 2⁻²⁴ each, of a result that is smaller than Σ|products| / 3.
TOLERANCE = 72 * 3 * 2**-24


def convolution(kernel_size=3, dtype=torch.float32):
    """Every element random, those of channels beyond a task's own, too: they must have no effect."""
    conv = TaskConvIn(COUNTS, 4, 6, kernel_size)
    generator = torch.Generator().manual_seed(0)
    for parameter in conv.parameters():
        parameter.data.normal_(generator=generator)
    return conv.to(dtype)


def samples(channels=8, size=(7, 10)):
    return torch.randn(len(IDS), channels, *size, generator=torch.Generator().manual_seed(1))


def one_by_one(conv, sample, ids=IDS):
    outputs = []
    for x, task in zip(sample, ids.tolist(), strict=True):
        own = min(4 + COUNTS[task], len(x))
        kernel, bias = conv.weight[task, :, :own], conv.bias[task]
        outputs.append(F.conv2d(x[None, :own], kernel, bias, padding=conv.kernel_size // 2)[0])
    return torch.stack(outputs)


def assert_same(actual, expected):
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("channels", [4, 5, 6, 7, 8])
def test_each_sample_meets_the_convolution_of_its_task(kernel_size, channels):
    conv, sample = convolution(kernel_size), samples(channels)
    assert_same(conv(sample, IDS), one_by_one(conv, sample))


def test_missing_channels_count_as_zero():
    conv, sample = convolution(), samples()
    sample[:, 5:] = 0
    assert_same(conv(sample[:, :5], IDS), conv(sample, IDS))


def test_parameters_that_are_set_one_by_one_after_a_call_on_the_meta_device():
    conv, sample = convolution(), samples()
    expected, values = conv(sample, IDS), dict(conv.named_parameters())
    conv.to("meta")(sample.to("meta"), IDS.to("meta"))
    for name, parameter in values.items():  # as device maps do
        setattr(conv, name, parameter)
    assert torch.equal(conv(sample, IDS), expected)


@pytest.mark.parametrize("channels", [4, 8])
def test_channels_last_is_a_layout_and_no_other_convolution(channels):
    conv, sample = convolution(), samples(channels)
    output = conv(sample, IDS, channels_last=True)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not output.is_contiguous()
    assert_same(output, one_by_one(conv, sample))


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("grad", [False, True])
def test_channels_beyond_a_tasks_own_are_ignored_whatever_they_hold(junk, grad):
    conv, sample = convolution(), samples()
    expected = conv(sample, IDS)
    for x, task in zip(sample, IDS.tolist(), strict=True):
        x[4 + COUNTS[task] :] = junk
    with torch.set_grad_enabled(grad):
        assert torch.equal(conv(sample, IDS), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_reach_the_rows_of_present_tasks_only(channels_last):
    conv, sample = convolution(), samples().requires_grad_()
    reference = convolution()
    present = IDS != 1
    grad = torch.randn(5, 6, 7, 10, generator=torch.Generator().manual_seed(2))[present]
    conv(sample[present], IDS[present], channels_last=channels_last).backward(grad)
    weight_grad, bias_grad = conv.weight.grad, conv.bias.grad
    assert weight_grad is not None
    assert bias_grad is not None
    assert (weight_grad[1] == 0).all()
    assert (bias_grad[1] == 0).all()
    assert (weight_grad[0, :, 4:] == 0).all()
    assert (weight_grad[2, :, 6:] == 0).all()
    expected_sample = sample.detach().clone().requires_grad_()
    one_by_one(reference, expected_sample[present], IDS[present]).backward(grad)
    assert_same(conv.weight.grad, reference.weight.grad)
    assert_same(conv.bias.grad, reference.bias.grad)
    assert_same(sample.grad, expected_sample.grad)


@pytest.mark.parametrize("channels", [0, 1, 3, 9])
def test_a_wrong_number_of_channels_raises(channels):
    with pytest.raises(ValueError, match=rf"sample must have 4 to 8 channels .*, but got {channels}\."):
        convolution()(samples(channels), IDS)


def test_without_task_ids_it_is_the_identity():
    sample = samples(3)
    assert convolution()(sample) is sample


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    conv, sample = convolution(dtype=dtype), samples().to(dtype)
    exact = one_by_one(conv.double(), sample.double())
    error = (convolution(dtype=dtype)(sample, IDS) - exact).abs().max()
    # The output is rounded once (half an ulp of the largest), and may have been accumulated in float32 blocks.
    assert error <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_an_empty_batch_and_a_batch_of_one():
    conv = convolution()
    for channels_last in (False, True):
        assert conv(samples()[:0], IDS[:0], channels_last=channels_last).shape == (0, 6, 7, 10)
    assert_same(conv(samples()[:1], IDS[:1]), one_by_one(conv, samples()[:1], IDS[:1]))


def test_a_non_contiguous_sample():
    conv, sample = convolution(), samples().to(memory_format=torch.channels_last)
    assert_same(conv(sample, IDS), one_by_one(conv, sample))
    assert_same(conv(sample.transpose(2, 3), IDS), one_by_one(conv, sample.transpose(2, 3)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_exported_convolution_takes_any_batch(channels_last):
    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = convolution()

        def forward(self, sample, task_ids):
            return self.conv(sample, task_ids, channels_last=channels_last)

    call, batch = Call(), torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(call, (samples(), IDS), dynamic_shapes=({0: batch}, {0: batch}))
        for count in (1, 4):
            output = program.module()(samples()[:count], IDS[:count])
            assert_same(output, one_by_one(call.conv, samples()[:count], IDS[:count]))
            if count > 1:
                assert output.is_contiguous(memory_format=torch.channels_last) == channels_last
