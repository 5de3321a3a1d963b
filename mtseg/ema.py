"""The teacher: an exponential moving average of the student's weights.

Tarvainen and Valpola, "Mean teachers are better role models: Weight-averaged consistency targets improve
semi-supervised deep learning results", NeurIPS 2017 (arXiv:1703.01780), equation 2.
"""

import torch


@torch.no_grad()
def update_ema_variables(model, ema_model, alpha, global_step, average_buffers=False):
    """teacher <- a teacher + (1 - a) student, in place, with a = min(1 - 1 / (global_step + 1), alpha).

    `global_step` counts updates from 0. At first the teacher is the true average of all students so far (at step 0 it
    becomes the student); later `alpha` holds. Both networks have the same architecture and lie on the same device.

    By default only parameters are averaged, as in the paper and in the whole family. The running statistics of the
    teacher's batch norm are then estimated from the teacher's own inputs, which is right as long as it stays in train()
    mode and sees data like the student's. Set `average_buffers=True` where the teacher runs in eval() mode during
    training: its statistics would otherwise stay those of its initialisation. Floating-point buffers are then averaged
    as parameters are, and integer buffers (num_batches_tracked) are copied. ValueError for a teacher in half precision.
    """
    alpha = min(1 - 1 / (global_step + 1), alpha)
    averaged = list(zip(ema_model.parameters(), model.parameters(), strict=True))
    if any(teacher.dtype in (torch.float16, torch.bfloat16) for teacher, _ in averaged):
        raise ValueError("a teacher in half precision loses steps of 1 - alpha: keep its weights in float32")
    if average_buffers:
        for ema_buffer, buffer in zip(ema_model.buffers(), model.buffers(), strict=True):
            if ema_buffer.is_floating_point():
                averaged.append((ema_buffer, buffer))
            else:
                ema_buffer.copy_(buffer)
    if averaged:
        # All tensors in two calls: on a GPU two kernels, where a loop would start two for each of a hundred tensors.
        teacher, student = (list(tensors) for tensors in zip(*averaged, strict=True))
        torch._foreach_mul_(teacher, alpha)
        torch._foreach_add_(teacher, student, alpha=1 - alpha)


@torch.no_grad()
def relative_distance(model, ema_model):
    """||teacher - student|| / ||student|| over all parameters, a scalar tensor of at least 0."""
    student = list(model.parameters())
    distances = torch._foreach_norm(torch._foreach_sub(list(ema_model.parameters()), student))
    return torch.stack(distances).norm() / torch.stack(torch._foreach_norm(student)).norm()
