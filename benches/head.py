#!/usr/bin/env python3
"""Linear with reverse KL, forward and backward, in PyTorch on one card: beside which `h1 bench kernels --only loss` stands.

    python3 head.py [--tokens 16384] [--hidden 5120] [--vocabulary 131072] [--chunk 4096]

Student's and teacher's logits, the loss, and the gradients of the student's rows and head: four products. The loss is a
function of a chunk of rows, eager and compiled; gradients of the head add up from chunk to chunk.
"""
import argparse, statistics
import torch

ap = argparse.ArgumentParser()
ap.add_argument("--tokens", type=int, default=16384)
ap.add_argument("--hidden", type=int, default=5120)
ap.add_argument("--vocabulary", type=int, default=131072)
ap.add_argument("--chunk", type=int, default=4096)
args = ap.parse_args()


def rand(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def chunk_loss(x, head, teacher_x, teacher_head):
    student = torch.log_softmax((x @ head.T).float(), -1)
    teacher = torch.log_softmax((teacher_x @ teacher_head.T).float(), -1)
    return (student.exp() * (student - teacher)).sum() / args.tokens


x, teacher_x = rand(args.tokens, args.hidden), rand(args.tokens, args.hidden)
head, teacher_head = rand(args.vocabulary, args.hidden, scale=0.02), rand(args.vocabulary, args.hidden, scale=0.02)
x.requires_grad_(), head.requires_grad_()


def step(loss):
    x.grad = None
    head.grad = None
    for rows, teacher_rows in zip(x.split(args.chunk), teacher_x.split(args.chunk)):
        loss(rows, head, teacher_rows, teacher_head).backward()


print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: {args.tokens} × {args.hidden} × {args.vocabulary}, bf16, chunks of {args.chunk}")
flop = 4 * 2 * args.tokens * args.hidden * args.vocabulary
for name, loss in (("eager", chunk_loss), ("compiled", torch.compile(chunk_loss, fullgraph=True))):
    step(loss)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - x.grad.nbytes - head.grad.nbytes
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step(loss)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    ms, peak = statistics.median(times), torch.cuda.max_memory_allocated() - held
    print(f"  {name:9} {ms:8.1f} ms {flop / ms / 1e9:6.0f} TFLOP/s, {peak / 2**30:.1f} GiB beside rows and heads", flush=True)
