"""The teacher: an exponential moving average of the student's weights.

Tarvainen and Valpola, "Mean teachers are better role models: Weight-averaged consistency targets improve
semi-supervised deep learning results", NeurIPS 2017 (arXiv:1703.01780), equation 2.
"""

import torch


@torch.no_grad()
def update_ema_variables(model, ema_model, alpha, global_step, average_buffers=False):
    """teacher <- a teacher + (1 - a) student, in place, with a = min(1 - 1 / (global_step + 1), alpha).

    `global_step` counts updates from 0, so that the first updates are the true average of the students seen so far
    (at step 0 the teacher becomes the student); afterwards `alpha` holds. Both networks have the same architecture
    and lie on the same device.

    Only parameters are averaged by default, as in the paper and in the whole family. The teacher's batch-norm
    running statistics are then its own: they are estimated from what the teacher is shown, which is right as long as
    it stays in train() mode and sees data like the student's. Set `average_buffers=True` when the teacher runs in
    eval() mode during training: nothing would update its statistics then, and it would normalise with those of its
    initialisation. Floating-point buffers are then averaged like parameters, integer buffers (num_batches_tracked)
    are copied.
    """
    alpha = min(1 - 1 / (global_step + 1), alpha)
    averaged = list(zip(ema_model.parameters(), model.parameters(), strict=True))
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
    """||teacher - student|| / ||student|| over all parameters, a scalar tensor >= 0: how far the teacher lags."""
    student = list(model.parameters())
    apart = torch._foreach_norm(torch._foreach_sub(list(ema_model.parameters()), student))
    return torch.stack(apart).norm() / torch.stack(torch._foreach_norm(student)).norm()
