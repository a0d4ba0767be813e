#!/usr/bin/env python3
"""Times h1's mixer kernels on one card beside PyTorch, after holding them to a reference.

    python3 mixers.py KERNELS_FOLDER [--only scan,attention,conv] [--quick]      on a card: NVRTC and the driver through ctypes
    python3 mixers.py KERNELS_FOLDER --emulate                                   anywhere: small shapes on the CPU, no times
"""
import math, sys
import torch
import torch.nn.functional as F
from engine import FL, I, L, P, R, Rows, TensorMap
from scan import Scan, scan
from trial import CTYPE, DEV, ENGINE, FAILED, MULTIPROCESSORS, args, check, kernel, segments_of, time_us

# ---------------------------------------------------------------- convolution
def conv():
    print("conv1d: correctness, then time (16384 × 1024 to 4096, 4 taps)")
    for lengths, ci, head, dtype, tol in (([130], 32, 16, torch.float32, 1e-5), ([1, 2, 66, 3, 62], 40, 20, torch.float32, 1e-5), ([1, 2, 66, 3, 62], 45, 15, torch.float32, 1e-5), ([64, 9], 80, 40, torch.bfloat16, 2e-2),
                                          ([100], 96, 16, torch.bfloat16, 2e-2), ([2048], 1024, 16, torch.bfloat16, 2e-2), ([16384], 1024, 16, torch.bfloat16, None)):
        t, rep, w = sum(lengths), 4, 4
        if args.emulate and t > 1000:
            continue
        x = torch.randn(t, ci, device=DEV).to(dtype)
        weight, bias = torch.randn(ci * rep, w, device=DEV).to(dtype), torch.randn(ci * rep, device=DEV).to(dtype)
        dout = torch.randn(t, ci * rep, device=DEV).to(dtype)
        table, _, _ = segments_of(lengths)
        out, dx = torch.empty(t, ci * rep, device=DEV, dtype=dtype), torch.empty_like(x)
        blocks = (t + 63) // 64
        partial = torch.empty(blocks, ci * rep, w + 1, device=DEV)
        dweight, dbias = torch.zeros(ci * rep, w, device=DEV), torch.zeros(ci * rep, device=DEV)
        c = CTYPE[dtype]
        pack = 2 if head % 2 == 0 else 1
        column_blocks = -(-ci // pack // 128)
        conv_rows = max(1, min(64, t * column_blocks // (4 * MULTIPROCESSORS)))
        k = kernel("conv1d.cu", "conv1d", T_X=c, T_W=c, T_OUT=c, TAPS=w, REPEAT=rep, PACK=pack)
        d = dict(T_X=c, T_W=c, T_DOUT=c, T_DX=c, TAPS=w, REPEAT=rep)
        kb, ks = kernel("conv1d_backward.cu", "conv1d_backward", **d), kernel("conv1d_backward.cu", "conv1d_backward_sum", **d)
        a = [R(x), R(weight), P(bias), P(table), I(len(lengths)), L(t), I(ci), I(head), I(rep), I(1), Rows(0, 0), L(0), R(out), I(conv_rows)]
        ab = [R(x), R(weight), P(bias), P(table), I(len(lengths)), L(t), I(ci * rep), I(head), I(1), Rows(0, 0), L(0), R(dout), Rows(0, 0), L(0), R(dx), P(partial)]
        asum = [P(partial), I(blocks), I(ci * rep), R(dweight), P(dbias)]
        forward = lambda: k((-(-t // conv_rows), column_blocks), (128,), 0, a)

        def backward():
            kb((blocks, -(-ci // 128)), (128,), 0, ab)
            ks(((ci * rep * (w + 1) + 255) // 256,), (256,), 0, asum)

        if tol is None:
            print(f"  {c} forward {time_us(forward):.0f} µs, backward {time_us(backward):.0f} µs")
            continue
        forward(); backward()
        f = lambda v: v.double().detach().requires_grad_()
        xr, wr, br = f(x), f(weight), f(bias)
        xx = xr.view(t, ci // head, 1, head).expand(-1, -1, rep, -1).reshape(t, -1)
        pre = torch.cat([F.conv1d(F.pad(part.T[None], (w - 1, 0)), wr[:, None], br, groups=ci * rep)[0].T for part in xx.split(lengths)])
        want = F.silu(pre)
        want.backward(dout.double())
        name = f"{c} {lengths}×{ci} "
        for n, g, r in (("out", out, want), ("dx", dx, xr.grad), ("dweight", dweight, wr.grad), ("dbias", dbias, br.grad)):
            check(name + n, g, r, tol)


# ---------------------------------------------------------------- attention
class Attention:
    def __init__(self, lengths, pasts, heads, kv_heads, hd, dtype, window=0, page_size=0, seed=0):
        g = torch.Generator(device=DEV).manual_seed(seed)
        rand = lambda *s: torch.randn(*s, generator=g, device=DEV)
        self.lengths, self.heads, self.kv, self.hd, self.dtype, self.window = lengths, heads, kv_heads, hd, dtype, window
        self.table, self.t, keys = segments_of(lengths, pasts)
        self.q = rand(self.t, heads * hd).to(dtype)
        self.k, self.v = rand(keys, kv_heads * hd).to(dtype), rand(keys, kv_heads * hd).to(dtype)
        self.dout = rand(self.t, heads * hd).to(dtype)
        self.out, self.lse = torch.full_like(self.q, float("nan")), torch.full((self.t, heads), float("nan"), device=DEV)
        self.scale, self.group, self.page_size = hd ** -0.5, heads // kv_heads, page_size
        self.pages = None
        self.kk, self.vv = self.k, self.v
        if page_size:
            per = max((n + p + page_size - 1) // page_size for n, p in zip(lengths, pasts))
            order = torch.randperm(per * len(lengths) + 1, generator=torch.Generator().manual_seed(1))
            self.pages = torch.full((len(lengths), per), 4_000_000, dtype=torch.int32, device=DEV)
            self.kk = torch.full((len(order) * page_size, kv_heads * hd), float("nan"), device=DEV, dtype=dtype)
            self.vv = self.kk.clone()
            free = iter(order.tolist())
            for s, (start, n, past, slot, first) in enumerate(self.table.tolist()):
                for page in range((n + past + page_size - 1) // page_size):
                    to = next(free)
                    self.pages[s, page] = to
                    a, b = page * page_size, min((page + 1) * page_size, n + past)
                    self.kk[to * page_size:to * page_size + b - a] = self.k[first + a:first + b]
                    self.vv[to * page_size:to * page_size + b - a] = self.v[first + a:first + b]

    def keys(self):
        p = self.pages
        return [R(self.kk), R(self.vv), L(self.kk.shape[0]), P(p), L(p.shape[0] if p is not None else 0), L(p.shape[1] if p is not None else 0), I(max(1, self.page_size))]

    def combine(self, parts):
        self.po = torch.empty(parts, self.t, self.heads, self.hd, device=DEV) if parts > 1 else None
        self.pl = torch.full((parts, self.t, self.heads), float("nan"), device=DEV) if parts > 1 else None
        k = kernel("attention_combine.cu", "attention_combine", T_OUT=CTYPE[self.dtype], HEAD_DIM=self.hd)
        warps = min(8, 2 ** math.ceil(math.log2(-(-parts // 8))))
        a = [P(self.po), P(self.pl), I(parts), I(warps), L(self.t), I(self.heads), R(self.out), R(self.lse)]
        held = self.po, self.pl
        return lambda: held and parts > 1 and k((-(-self.t * self.heads // (8 // warps)),), (256,), 0, a)

    def tiles(self):
        """Rows of a block, columns of a tile, and bytes of `rows` and `cols` rows and of weights."""
        cols = 32 if self.hd > 64 else 64
        return cols, lambda rows, count, own: 4 * (count * (-(-self.hd // 32) * 32 + 4) + own * (cols + 4) + 2 * cols)

    def plain(self, rows=64, parts=1):
        x, (cols, size) = CTYPE[self.dtype], self.tiles()
        k, combine = kernel("attention.cu", "attention", T_Q=x, T_KV=x, T_OUT=x, HEAD_DIM=self.hd, ROWS=rows), self.combine(parts)
        a = [R(self.q)] + self.keys() + [P(self.table), I(len(self.lengths)), L(self.t), I(self.group), FL(self.scale), L(self.window), R(self.out), R(self.lse), P(self.po), P(self.pl)]
        tiles = self.t * self.group // rows + len(self.lengths)

        def run():
            k((self.kv, tiles, parts), (128,), size(rows, rows + 2 * cols, rows), a)
            combine()

        run.info = k.info
        return run

    def mma(self, warps=4, m_tiles=2, parts=1):
        x = CTYPE[self.dtype]
        d = dict(T_X=x, HEAD_DIM=self.hd, WARPS=warps, M_TILES=m_tiles)
        k, combine = kernel("attention_mma.cu", "attention_mma", **d), self.combine(parts)
        rows = warps * m_tiles * 16
        queries = rows // self.group
        tiles = self.t // queries + len(self.lengths)
        a = [R(self.q)] + self.keys() + [P(self.table), I(len(self.lengths)), L(self.t), I(self.group), FL(self.scale), L(self.window), R(self.out), R(self.lse), P(self.po), P(self.pl)]
        shared = (rows + 4 * 64) * self.hd * 2

        def run():
            k((self.kv, tiles, parts), (warps * 32,), shared, a)
            combine()

        run.info = k.info
        return run

    def wgmma(self):
        rows, keys, slots = 192, 128 if self.hd == 64 else 64 if self.page_size else 80, 8
        k = kernel("attention_wgmma.cu", "attention_wgmma", T_X=CTYPE[self.dtype], HEAD_DIM=self.hd, KEYS_A_SLOT=keys)
        tiles = self.t // (rows // self.group) + len(self.lengths)
        together = max(1, min(self.kv, (32 << 20) // (self.kk.shape[0] * self.hd * 4)))
        self.counter = torch.zeros(1, dtype=torch.int32, device=DEV)
        page, box = max(1, self.page_size), math.gcd(self.page_size, keys)
        maps = [TensorMap(ENGINE, self.q, self.heads, self.group, rows // self.group)] + [TensorMap(ENGINE, x, self.kv, 1, box) for x in (self.kk, self.vv)]
        table = [P(self.pages)] + [I(n) for n in (self.pages.shape if page > 1 else (0, 0))]
        a = maps + [I(self.kk.shape[0])] + table + [I(self.kk.shape[0] // page), I(page), I(box), P(self.table), I(len(self.lengths)), L(self.t), I(self.kv), I(self.group),
                                                    I(tiles), I(together), FL(self.scale), L(self.window), P(self.counter), R(self.out), R(self.lse)]

        def run():
            self.counter.zero_()
            k((min(MULTIPROCESSORS, tiles * self.kv),), (512,), (rows + slots * keys) * self.hd * 2 + 1024, a)

        run.info = k.info
        return run

    def backward_inputs(self):
        return [R(self.q), R(self.k), R(self.v), L(self.k.shape[0]), P(self.table), I(len(self.lengths)), L(self.t), I(self.heads), I(self.group), FL(self.scale), L(self.window),
                R(self.lse), P(self.delta), R(self.dout)]

    def backward(self, path, rows=64):
        x = CTYPE[self.dtype]
        self.delta = torch.empty(self.t, self.heads, device=DEV)
        self.dq, self.dk, self.dv = (torch.full_like(y, float("nan")) for y in (self.q, self.k, self.v))
        d = dict(T_Q=x, T_KV=x, T_OUT=x, T_DOUT=x, T_DQ=x, T_DKV=x, HEAD_DIM=self.hd, ROWS=rows)
        kd = kernel("attention_backward.cu", "attention_delta", **d)
        ad = [R(self.out), R(self.dout), L(self.t), I(self.heads), P(self.delta)]
        a = self.backward_inputs()
        if path == "wgmma":
            return self.backward_wgmma(lambda: kd(((self.t * self.heads + 3) // 4,), (128,), 0, ad), kernel("attention_backward.cu", "attention_dkv_sum", **d))
        if path == "mma":
            m = dict(T_X=x, HEAD_DIM=self.hd)
            kq, kkv = kernel("attention_backward_mma.cu", "attention_dq_mma", **m), kernel("attention_backward_mma.cu", "attention_dkv_mma", **m)
            queries = 128 // self.group
            tiles, key_tiles = self.t // queries + len(self.lengths), self.k.shape[0] // 64 + len(self.lengths)

            def run():
                kd(((self.t * self.heads + 3) // 4,), (128,), 0, ad)
                kq((self.kv, tiles), (256,), MMA_DQ_SHARED(self.hd), a + [R(self.dq)])
                kkv((self.kv, key_tiles), (128,), MMA_DKV_SHARED(self.hd), a + [R(self.dk), R(self.dv)])
            run.info = lambda: (kq.info(), kkv.info())
        else:
            kq, kkv = kernel("attention_backward.cu", "attention_dq", **d), kernel("attention_backward.cu", "attention_dkv", **d)
            cols, size = self.tiles()
            shared = size(rows, 2 * rows + 2 * cols, rows)
            tiles, key_tiles = self.t * self.group // rows + len(self.lengths), self.k.shape[0] // rows + len(self.lengths)

            def run():
                kd(((self.t * self.heads + 3) // 4,), (128,), 0, ad)
                kq((self.kv, tiles), (128,), shared, a + [R(self.dq)])
                kkv((self.kv, key_tiles), (128,), shared, a + [R(self.dk), R(self.dv)])
            run.info = lambda: (kq.info(), kkv.info())
        return run

    def backward_wgmma(self, make_delta, ks):
        kq, kkv = (kernel("attention_backward_wgmma.cu", f"attention_{name}_wgmma", T_X=CTYPE[self.dtype], HEAD_DIM=self.hd) for name in ("dq", "dkv"))
        rows, dq_keys, slots, query_rows, keys, stages = (192, 80, 8, 64, 192, 6) if self.hd == 64 else (192, 64, 8, 64, 128, 4)
        maps = lambda rows, keys: [TensorMap(ENGINE, self.q, self.heads, self.group, rows // self.group)] + [TensorMap(ENGINE, x, self.kv, 1, keys) for x in (self.k, self.v)] + [
            TensorMap(ENGINE, self.dout, self.heads, self.group, rows // self.group)]
        rest = self.backward_inputs()[3:-1]
        aq, akv = maps(rows, dq_keys) + rest + [R(self.dq)], maps(query_rows, keys) + rest + [R(self.dk), R(self.dv)]
        key_rows, width = self.k.shape
        split = max(1, min(8, MULTIPROCESSORS // (-(-key_rows // keys) * self.kv)))
        self.partials = torch.empty(split, 2, key_rows, width, device=DEV) if split > 1 else None
        akv.append(P(self.partials))
        asum = [P(self.partials), I(split), L(key_rows), I(width), R(self.dk), R(self.dv)]
        tiles, key_tiles = self.t // (rows // self.group) + len(self.lengths), self.k.shape[0] // keys + len(self.lengths)

        def run(parts="delta dq dkv"):
            if "delta" in parts:
                make_delta()
            if "dq" in parts:
                kq((self.kv, tiles), (512,), (2 * rows + slots * dq_keys) * self.hd * 2 + 1024, aq)
            if "dkv" in parts:
                kkv((self.kv, key_tiles, split), (keys * 2 + 128,), (2 * keys + stages * 2 * query_rows) * self.hd * 2 + stages * 8 * query_rows + 1024, akv)
                if split > 1:
                    ks((2 * key_rows, -(-width // 256)), (256,), 0, asum)

        run.info = lambda: (kq.info(), kkv.info())
        return run

    def reference(self):
        f = lambda t: t.double().detach().requires_grad_()
        q, k, v = f(self.q), f(self.k), f(self.v)
        outs, lses = [], []
        for start, n, past, _, first in self.table.tolist():
            qs = q[start:start + n].view(n, self.heads, self.hd).transpose(0, 1)
            ks, vs = (x[first:first + n + past].view(n + past, self.kv, self.hd).transpose(0, 1).repeat_interleave(self.group, 0) for x in (k, v))
            scores = qs @ ks.transpose(1, 2) * self.scale
            pq, pk = torch.arange(past, past + n, device=DEV)[:, None], torch.arange(n + past, device=DEV)[None]
            hidden = (pk > pq) | ((pk <= pq - self.window) if self.window else torch.zeros_like(pk > pq))
            scores = scores.masked_fill(hidden, float("-inf"))
            lses.append(torch.logsumexp(scores, -1).T)
            outs.append((torch.softmax(scores, -1) @ vs).transpose(0, 1).reshape(n, -1))
        out, lse = torch.cat(outs), torch.cat(lses)
        out.backward(self.dout.double())
        return out, lse, q.grad, k.grad, v.grad


def MMA_DQ_SHARED(hd):
    return (2 * 128 + 2 * 2 * 64) * hd * 2


def MMA_DKV_SHARED(hd):
    return (2 * 64 + 2 * 2 * 64) * hd * 2 + 2 * 2 * 64 * 4


def attention():
    print("attention: correctness")
    cases = [  # lengths, pasts, heads, kv heads, head size, dtype, window, page size, (warps, m_tiles, parts), tolerance
        ([70, 1, 33], [0, 5, 40], 4, 2, 128, torch.bfloat16, 0, 0, (4, 2, 1), 1e-2),
        ([97, 20], [0, 100], 4, 1, 64, torch.float16, 33, 0, (4, 2, 1), 2e-3),
        ([130], [70], 3, 1, 64, torch.bfloat16, 0, 16, (4, 2, 1), 1e-2),
        ([40], [700], 4, 2, 128, torch.bfloat16, 0, 16, (4, 2, 1), 1e-2),
        ([1, 1, 1], [300, 7, 64], 8, 2, 128, torch.bfloat16, 0, 16, (1, 1, 3), 1e-2),
        ([1, 2], [129, 200], 2, 2, 64, torch.float16, 100, 3, (1, 1, 2), 2e-3),
        ([70, 1, 33], [0, 5, 40], 6, 2, 80, torch.float32, 0, 0, 64, 1e-5),
        ([97, 20], [0, 100], 5, 1, 22, torch.float32, 33, 0, 16, 1e-5),
        ([40, 1], [50, 3], 3, 3, 200, torch.float32, 0, 5, 16, 1e-5),
    ]
    if not args.emulate:
        cases += [([3000, 1, 1000], [0, 50, 1000], 32, 8, 128, torch.bfloat16, 0, 0, (4, 2, 1), 1e-2), ([2000], [100], 32, 8, 128, torch.bfloat16, 512, 16, (4, 2, 1), 1e-2)]
    for lengths, pasts, heads, kv, hd, dtype, window, page, shape, tol in cases:
        a = Attention(lengths, pasts, heads, kv, hd, dtype, window, page)
        out, lse, dq, dk, dv = a.reference()
        name = f"{CTYPE[dtype]} {lengths}+{pasts} {heads}/{kv}×{hd} w{window} p{page} "
        plainly = dtype == torch.float32
        runs = dict(plain=a.plain(), few=a.plain(16), parts=a.plain(16, 3))
        if not plainly:
            runs["mma"] = a.mma(*shape)
            if page % 8 == 0:
                runs["wgmma"] = a.wgmma()
        for path, run in runs.items():
            a.out.fill_(float("nan")); a.lse.fill_(float("nan"))
            run()
            check(name + path + " out", a.out, out, tol); check(name + path + " lse", a.lse, lse, 1e-4)
        if page:
            continue
        for path in ("plain",) if plainly else ("plain", "mma", "wgmma"):
            a.backward(path, shape if plainly else 64)()
            for n, g, r in (("dq", a.dq, dq), ("dk", a.dk, dk), ("dv", a.dv, dv)):
                check(name + path + " " + n, g, r, 2 * tol)
    if args.emulate:
        return
    print("attention: times, causal, TFLOP/s by 2 (forward) and 5 (backward) products of half the square")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    for t, heads, kv, hd in ((16384, 32, 8, 128), (4096, 32, 8, 128), (16384, 32, 8, 64), (4096, 32, 8, 64)):
        if args.quick and (t, hd) != (16384, 128):
            continue
        a = Attention([t], [0], heads, kv, hd, torch.bfloat16)
        flop = 2 * 2 * t * t / 2 * heads * hd
        show = lambda us, n=2: f"{us:8.0f} µs {flop * n / 2 / us / 1e6:6.0f}"
        print(f"  {t} tokens, {heads}/{kv} × {hd}: the median of five rounds, in which each has its turn")
        q = a.q.view(1, t, heads, hd).transpose(1, 2).detach().requires_grad_()
        k, v = (x.view(1, t, kv, hd).transpose(1, 2).detach().requires_grad_() for x in (a.k, a.v))
        call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        times, info = {}, {}

        def turn(name, forward, backward):
            times.setdefault(name, []).append((time_us(forward, 5), time_us(backward, 3)))

        for _ in range(5):
            for path in ("mma", "wgmma"):
                run, back = getattr(a, path)(), a.backward(path)
                turn(path, run, back)
                info[path] = f"{run.info()} {back.info()}"
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
                with sdpa_kernel(backend):
                    o = call(); do = torch.randn_like(o)

                    def forward():
                        with torch.no_grad():
                            call()

                    turn(name, forward, lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True))
        for name, rounds in times.items():
            us, back = (sorted(side)[len(rounds) // 2] for side in zip(*rounds))
            print(f"    {name:5} forward {show(us)}  backward {show(back, 5)}  {info.get(name, '')}", flush=True)


    for heads, kv, hd in ((9, 3, 64), (32, 8, 128)):
        a = Attention([4096], [0], heads, kv, hd, torch.float32)
        flop = 4096 * 4096 * 2 * heads * hd
        run, back = a.plain(), a.backward("plain")
        us, back_us = time_us(run, 5), time_us(back, 3)
        print(f"  f32, 4096 tokens, {heads}/{kv} × {hd}: forward {us:8.0f} µs {flop / us / 1e6:6.1f}  backward {back_us:8.0f} µs {flop * 2.5 / back_us / 1e6:6.1f}  {run.info()} {back.info()}")
        q = a.q.view(1, 4096, heads, hd).transpose(1, 2).detach().requires_grad_()
        k, v = (x.view(1, 4096, kv, hd).transpose(1, 2).repeat_interleave(heads // kv, 1).detach().requires_grad_() for x in (a.k, a.v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True); do = torch.randn_like(o)
            us = time_us(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), 5)
            back_us = time_us(lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), 3)
        print(f"    PyTorch's memory-efficient attention: forward {us:8.0f} µs {flop / us / 1e6:6.1f}  backward {back_us:8.0f} µs {flop * 2.5 / back_us / 1e6:6.1f}")
    run = Attention([16384], [0], 32, 8, 128, torch.bfloat16, page_size=64).wgmma()
    us = time_us(run, 5)
    print(f"  16384 tokens, 32/8 × 128, keys in pages of 64: wgmma forward {us:8.0f} µs {16384 * 16384 * 2 * 32 * 128 / us / 1e6:6.0f}")


def decode():
    if args.emulate:
        return
    print("attention, decode: one token a sequence over pages of 16, 32/8 × 128, GB/s of keys and values")
    for batch, context in ((1, 16384), (16, 8192), (64, 8192)):
        a = Attention([1] * batch, [context - 1] * batch, 32, 8, 128, torch.bfloat16, 0, 16)
        best = None
        for parts in (1, 2, 4, 8, 16, 32, 64):
            us = time_us(a.mma(1, 1, parts))
            if best is None or us < best[0]:
                best = (us, parts)
        us, parts = best
        print(f"  {batch:3} × {context}: {us:7.1f} µs with {parts} parts, {batch * context * 2 * 8 * 128 * 2 / us / 1e3:6.0f} GB/s", flush=True)


def profile(what):
    if what.startswith("scan"):
        s = Scan([16384], 256, 64)
        s.forward()()
        run = s.backward() if what == "scan_backward" else s.forward(False)
    elif what.startswith("attention"):
        a = Attention([16384], [0], 32, 8, 128, torch.bfloat16)
        run = a.mma()
        if what == "attention_backward":
            run(); run = a.backward("mma")
    elif what == "decode":
        run = Attention([1] * 16, [8191] * 16, 32, 8, 128, torch.bfloat16, 0, 16).mma(1, 1, 8)
    for _ in range(3):
        run()
    torch.cuda.synchronize()


if args.profile:
    profile(args.profile)
    sys.exit(0)
import traceback
for name, section in (("scan", scan), ("conv", conv), ("attention", attention), ("decode", decode)):
    if name in args.only.split(","):
        try:
            section()
        except Exception:
            traceback.print_exc()
            FAILED.append(name + " broke off")
print("all right" if not FAILED else f"{len(FAILED)} WRONG: {FAILED}")
sys.exit(bool(FAILED))
