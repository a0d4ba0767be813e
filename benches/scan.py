"""The section of mixers.py on the selective scan."""
import torch
import torch.nn.functional as F
from engine import I, L, P, R, Rows
from trial import CTYPE, DEV, MULTIPROCESSORS, args, check, kernel, segments_of, time_us

CHUNK = 16


class Scan:
    """Sizes and tensors of one scan; projected holds z, B, C."""

    def __init__(self, lengths, heads, groups_b, width=16, n=16, dtype=torch.bfloat16, seed=0, lanes=8, group=16, held=16, vector=1, of16=True, part=0):
        g = torch.Generator(device=DEV).manual_seed(seed)
        rand = lambda *s: torch.randn(*s, generator=g, device=DEV)
        self.lengths, self.n, self.heads, self.groups_b, self.dtype = lengths, n, heads, groups_b, dtype
        self.ch = heads * width
        self.table, self.t, _ = segments_of(lengths)
        self.cols = [0, self.ch, self.ch + groups_b * n]          # z, B, C
        self.projected = rand(self.t, self.cols[2] + heads * n).to(dtype)
        self.u = rand(self.t, self.ch).to(dtype)
        self.delta = (rand(self.t, self.ch) - 4).to(dtype)
        self.a = -(torch.arange(1, n + 1, device=DEV).float().repeat(self.ch, 1)) * torch.exp(0.1 * rand(self.ch, n))
        self.d, self.bias = 1 + 0.1 * rand(self.ch), 0.3 * rand(self.ch)
        self.dout = rand(self.t, self.ch).to(dtype)
        self.rows = self.t // CHUNK + len(lengths)
        self.saved = torch.empty(self.rows, self.ch * n, device=DEV)
        self.out = torch.empty_like(self.u)
        self.run = width
        self.lanes = lanes
        self.group, self.held, self.of16 = group, held, of16 and n == 16 and width == 16 and dtype != torch.float32
        self.defines = dict(T_U=CTYPE[dtype], T_DELTA=CTYPE[dtype], T_P=CTYPE[dtype], T_OUT=CTYPE[dtype], D_STATE=n, LANES=self.lanes, TILE=16, VECTOR=vector, GROUP=self.group, CUT=int(part > 0))
        self.tiles = heads * (-(-width // 16))
        # Segments cut in time after `part` tokens.
        self.part, self.items = part, sum(-(-n // part) for n in lengths) if part else len(lengths)
        self.enters = torch.empty(self.items, self.ch * n, device=DEV)

    def parts(self):
        return [I(len(self.lengths)), I(self.part)]

    def entering(self, back):
        """What makes what enters the parts, and where it lies."""
        if not self.part:
            return lambda: None, [Rows(0, 0), L(0)]
        defines = dict(**self.typed("T_X", "T_DELTA", "T_P"), D_STATE=self.n, BACK=int(back), VECTOR=1)
        kp, ke = (kernel("scan_parts.cu", name, **defines) for name in ("scan_parts", "scan_enter"))
        stretches = self.items * 4
        passed, spans = torch.empty(stretches, self.ch, self.n, device=DEV), torch.empty(stretches, self.ch, device=DEV)
        x, col, groups = (self.dout, 2, self.heads) if back else (self.u, 1, self.groups_b)
        gate = R(self.projected, 0) if back else Rows(0, 0)
        of_parts = [*self.parts(), I(self.ch), P(passed), P(spans)]
        ap = [R(x), R(self.delta), R(self.a), R(self.projected, self.cols[col]), gate, P(self.bias), I(1), P(self.table), L(self.t), I(self.ch // groups), *of_parts]
        ae = [R(self.a), P(self.table), L(self.t), *of_parts, Rows(0, 0), L(0), P(self.enters)]
        lanes = min(32, max(1, 1 << (-(-self.n // 8) - 1).bit_length()))

        def run(_kept=(passed, spans)):
            kp((-(-self.ch // (32 // lanes)), stretches), (256,), 0, ap)
            ke((-(-self.ch * self.n // 256), len(self.lengths)), (256,), 0, ae)

        return run, [R(self.enters), L(self.items)]

    def inputs(self):
        per_b, per_c = self.ch // self.groups_b, self.ch // self.heads
        p = self.projected
        return [R(self.u), R(self.delta), R(self.a), R(p, self.cols[1]), R(p, self.cols[2]), R(p, 0), P(self.d), P(self.bias), I(1),
                P(self.table), L(self.t), I(self.run), I(per_b), I(per_c)]

    def typed(self, *names):
        return {name: CTYPE[self.dtype] for name in names}

    def forward(self, save=True):
        before, enters = self.entering(False)
        if self.of16:
            k = kernel("selective_scan16.cu", "selective_scan16", **self.typed("T_U", "T_DELTA", "T_P", "T_OUT"), CUT=int(self.part > 0))
            saved = [R(self.saved), L(self.rows)] if save else [Rows(0, 0), L(0)]
            a = self.inputs() + enters + self.parts() + [Rows(0, 0), L(0)] + saved + [R(self.out), I(self.tiles)]
            half = 8 * 288 + 4 * 1312 + 4 * 640 + 16 * 160
            scan16_bytes = 2 * (2 * half + 8 * 32 * 80) + 8 * 5 * 2 * 32 * 16 * 2
            run = lambda: (before(), k((-(-self.tiles // 2), self.items), (512,), scan16_bytes, a))
            run.info = k.info
            return run
        k = kernel("selective_scan.cu", "selective_scan", **self.defines)
        pad = (self.n + self.lanes - 1) // self.lanes * self.lanes
        size = self.u.element_size()
        shared = 32 * ((2 if self.n <= 64 else 1) * size * (3 * 16 + 2 * self.n) + 8 * 18 + 8 * pad + 4 * 24)
        saved = [R(self.saved), L(self.rows)] if save else [Rows(0, 0), L(0)]
        a = self.inputs() + enters + self.parts() + [Rows(0, 0), L(0)] + saved + [R(self.out)]
        run = lambda: (before(), k((self.tiles, self.items), (16 * self.lanes,), shared, a))
        run.info = k.info
        return run

    def backward(self):
        x = CTYPE[self.dtype]
        defs = {**self.defines, **dict(T_DOUT=x, T_DU=x, T_DDELTA=x, T_DP=x, GROUP=self.held)}
        defs.pop("T_OUT")
        if self.of16:
            names = ("T_U", "T_DELTA", "T_P", "T_DOUT", "T_DU", "T_DDELTA", "T_DP")
            k = kernel("selective_scan16_backward.cu", "selective_scan16_backward", **self.typed(*names),
                       T_DB="float" if self.tiles > self.groups_b else x, T_DC=x, CUT=int(self.part > 0))
        else:
            k = kernel("selective_scan_backward.cu", "selective_scan_backward", **defs)
        ksum = kernel("scan_sums.cu", "scan_group_sum", T_DP=x)
        kseg = kernel("scan_sums.cu", "scan_segment_sum", T_DP=x)
        s, n, ch = self.items, self.n, self.ch
        before, enters = self.entering(True)
        self.du, self.ddelta = torch.empty_like(self.u), torch.empty_like(self.u)
        self.dp = torch.empty_like(self.projected)
        self.da = torch.empty_like(self.a)
        self.dd, self.dbias = torch.zeros_like(self.d), torch.zeros_like(self.bias)
        group = self.tiles // self.groups_b
        self.pb = torch.empty(self.t, self.tiles * n, device=DEV) if group > 1 else None
        self.pa = torch.empty(s, ch * n, device=DEV)
        self.pd = torch.empty(s, 2, ch, device=DEV)
        pad, size = (n + self.lanes - 1) // self.lanes * self.lanes, self.u.element_size()
        shared = 32 * ((2 if n <= 64 else 1) * size * (4 * 16 + 2 * n) + 16 * 18 + 8 * pad + 4 * 16 * pad + 12 * 24) + 2 * (self.lanes // 2) * self.held * 8 * pad
        a = self.inputs() + [Rows(0, 0), L(0)] + self.parts() + [R(self.saved), L(self.rows), R(self.dout), *enters, R(self.du), R(self.ddelta), R(self.dp, 0)]
        sums = [P(self.pa), P(self.pd), I(ch), Rows(0, 0), L(0)]
        db, dc = R(self.dp, self.cols[1]), R(self.dp, self.cols[2])
        grid, threads = (self.tiles, s), 16 * self.lanes
        if self.of16:
            a += [db if self.pb is None else R(self.pb), dc, *sums, I(self.tiles)]
            grid, threads, shared = (-(-self.tiles // 2), s), 256, 2 * (3 * 5760 + 2 * 22400) + 4 * 2 * 512 * 6 + 3 * 128 * 16
        else:
            a += [db, dc, P(self.pb), P(None), *sums]
        asum = [P(self.pb), L(self.t), I(self.tiles), I(group), I(n), R(self.dp, self.cols[1])]
        aseg = [P(self.pa), P(self.pd), P(self.table), I(len(self.lengths)), I(self.part), L(self.t), I(ch), I(n), R(self.da), P(self.dd), P(self.dbias)]

        def run():
            before()
            k(grid, (threads,), shared, a)
            if group > 1:
                ksum((self.t, 1), (256,), 0, asum)
            kseg(((ch * (n + 2) + 255) // 256,), (256,), 0, aseg)

        run.info = k.info
        return run

    def reference(self):
        """f64 with autograd; gives out and gradients."""
        f = lambda t: t.double().detach().requires_grad_()
        u, delta, a, p, d, bias = map(f, (self.u, self.delta, self.a, self.projected, self.d, self.bias))
        n, ch = self.n, self.ch
        z, b, c = p[:, :self.cols[1]], p[:, self.cols[1]:self.cols[2]], p[:, self.cols[2]:]
        b = b.view(self.t, self.groups_b, n).repeat_interleave(ch // self.groups_b, 1)
        c = c.view(self.t, self.heads, n).repeat_interleave(ch // self.heads, 1)
        dt = F.softplus(delta + bias)
        ys = []
        for start, length, *_ in self.table.tolist():
            s = torch.zeros(ch, n, dtype=torch.float64, device=DEV)
            for t in range(start, start + length):
                s = torch.exp(dt[t, :, None] * a) * s + (dt[t] * u[t])[:, None] * b[t]
                ys.append((s * c[t]).sum(1))
        out = (torch.stack(ys) + d * u) * F.silu(z)
        out.backward(self.dout.double())
        return out, u.grad, delta.grad, a.grad, p.grad, d.grad, bias.grad


def scan():
    print("selective scan: correctness")
    small = [(dict(lengths=[70, 1, 33], heads=4, groups_b=2), torch.bfloat16, 2e-2), (dict(lengths=[70, 16, 33], heads=3, groups_b=3), torch.bfloat16, 2e-2), (dict(lengths=[130], heads=2, groups_b=2), torch.float32, 3e-5),
             (dict(lengths=[65, 64], heads=4, groups_b=1), torch.float16, 3e-3),
             (dict(lengths=[37], heads=2, groups_b=1, lanes=8, group=16, held=4), torch.float32, 3e-5),
             (dict(lengths=[150, 0, 64, 31], heads=4, groups_b=2, part=64), torch.bfloat16, 2e-2), (dict(lengths=[150, 0, 64, 31], heads=2, groups_b=2, part=32), torch.float32, 3e-5)]
    if not args.emulate:
        small += [(dict(lengths=[300, 1, 200], heads=256, groups_b=64), torch.bfloat16, 2e-2)]
    for sizes, dtype, tol in small:
        s = Scan(**sizes, dtype=dtype)
        s.forward()(); s.backward()()
        out, *want = s.reference()
        name = f"{CTYPE[dtype]} {sizes['lengths']} {sizes['heads']}/{sizes['groups_b']} "
        check(name + "out", s.out, out, tol)
        for g, got, w in zip(("du", "ddelta", "dA", "dprojected", "dD", "dbias"), (s.du, s.ddelta, s.da, s.dp, s.dd, s.dbias), want):
            check(name + g, got, w, tol)
    if args.emulate:
        return
    print("selective scan: times (d_inner 4096, 256 heads of 16, d_state 16; B of 64 groups and of 256)")
    for groups in (64, 256):
        for dtype in (torch.bfloat16, torch.float32):
            for lengths in ([16384], [4096], [2048] * 8):
                if args.quick and (dtype != torch.bfloat16 or lengths != [16384]):
                    continue
                s = Scan(lengths, 256, groups, dtype=dtype)
                f, fs, b = s.forward(False), s.forward(True), s.backward()
                print(f"  {CTYPE[dtype]:5} groups {groups:3} {str(lengths[:2])[:-1] + (', …]' if len(lengths) > 2 else ']'):14} forward {time_us(f):7.0f} µs, saving {time_us(fs):7.0f} µs, "
                      f"backward {time_us(b, 5):7.0f} µs   regs {f.info().get('regs')}/{b.info().get('regs')} local {f.info().get('local')}/{b.info().get('local')}", flush=True)
                del s, f, fs, b
    print("selective scan: few heads, one sequence, cut in time: parts, forward (with states saved) and backward µs (of which what enters parts)")
    for dtype in (torch.bfloat16, torch.float32):
        for heads in (36,) if args.quick else (9, 36, 64, 128):
            for length in (512, 1024, 4096, 16384):
                line = []
                for parts in (1, 2, 3, 4, 7, 14, 28):
                    part = 0 if parts == 1 else -(-length // parts // 32) * 32
                    if part and (part < 64 or heads // 2 * parts > (1 if dtype == torch.bfloat16 else 4) * MULTIPROCESSORS):
                        continue
                    s = Scan([length], heads, heads, dtype=dtype, part=part)
                    line.append(f"{parts}: {time_us(s.forward(True), graph=True):.0f} {time_us(s.backward(), graph=True):.0f} ({time_us(s.entering(False)[0], graph=True):.0f} {time_us(s.entering(True)[0], graph=True):.0f})" if part else
                                f"{parts}: {time_us(s.forward(True), graph=True):.0f} {time_us(s.backward(), graph=True):.0f}")
                    del s
                print(f"  {CTYPE[dtype]:5} {heads:3} heads × {length:5}   " + "   ".join(line), flush=True)
    print("selective scan: the kernels for any number of states, bf16, groups 256, [16384]")
    for lanes, group in ((4, 16), (8, 16)):
        s = Scan([16384], 256, 256, lanes=lanes, group=group, held=16 if lanes == 8 else 8, of16=False)
        f = s.forward(True)
        us = time_us(f)
        b = s.backward()
        print(f"  lanes {lanes}: forward {us:.0f} µs, backward {time_us(b, 5):.0f} µs  {f.info()} {b.info()}", flush=True)
