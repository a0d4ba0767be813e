"""What mixers.py runs kernels on: a card, or the CPU in its place. Both give a launch(grid, block, shared bytes, arguments)."""
import ctypes, glob, hashlib, os, site, subprocess, sys
import torch


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_longlong)]


def R(t, col=0):
    if t is None:
        return Rows(0, 0)
    return Rows(t.data_ptr() + col * t.element_size(), t.stride(0))


def P(t):
    return ctypes.c_void_p(0 if t is None else t.data_ptr())


I, L, FL = ctypes.c_int, ctypes.c_longlong, ctypes.c_float


class TensorMap:
    """The tensor map of [rows, heads * size] 16-bit values and a box of rows, heads and 64 columns."""

    def __init__(self, engine, t, heads, box_heads, box_rows):
        rows, size, row_bytes = t.shape[0], t.shape[1] // heads, t.stride(0) * 2
        self.room = ctypes.create_string_buffer(192)
        self.at = ctypes.addressof(self.room) + -ctypes.addressof(self.room) % 64
        if engine.emulated:
            words = [t.data_ptr(), row_bytes, size * 2, size, heads, rows, box_heads, box_rows]
            (ctypes.c_ulonglong * 8).from_address(self.at)[:] = words
            return
        longs, ints = ctypes.c_ulonglong * 3, ctypes.c_uint * 3
        rc = engine.cu.cuTensorMapEncodeTiled(ctypes.c_void_p(self.at), 1, 3, ctypes.c_void_p(t.data_ptr()), longs(size, heads, rows), longs(size * 2, row_bytes),
                                              ints(64, box_heads, box_rows), ints(1, 1, 1), 0, 3, 3, 0)
        assert rc == 0, f"cuTensorMapEncodeTiled: {rc}"


class Cuda:
    """A card, through NVRTC and the driver."""
    emulated = False

    def __init__(self, folder):
        self.folder = folder
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.cu = ctypes.CDLL("libcuda.so.1")
        self.nvrtc = None
        names = ["libnvrtc.so.13", "libnvrtc.so"]
        for root in site.getsitepackages() + [os.path.dirname(os.path.dirname(torch.__file__))]:
            names += glob.glob(root + "/nvidia/*/lib/libnvrtc.so.1*")
        names += glob.glob("/usr/local/cuda*/lib64/libnvrtc.so*")
        for name in names:
            try:
                self.nvrtc = ctypes.CDLL(name)
                break
            except OSError:
                pass
        assert self.nvrtc is not None, "no libnvrtc"
        a, b = torch.cuda.get_device_capability()
        self.arch = f"sm_{a}{b}" + ("a" if a == 9 else "")
        self.modules = {}

    def kernel(self, file, entry, defines):
        text = "".join(f"#define {k} {v}\n" for k, v in defines.items()) + open(os.path.join(self.folder, file)).read()
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self.modules:
            n, prog = self.nvrtc, ctypes.c_void_p()
            n.nvrtcCreateProgram(ctypes.byref(prog), text.encode(), file.encode(), 0, None, None)
            opts = [f"--gpu-architecture={self.arch}", "-std=c++17", "-I" + self.folder, "-lineinfo"]
            arr = (ctypes.c_char_p * len(opts))(*[o.encode() for o in opts])
            rc = n.nvrtcCompileProgram(prog, len(opts), arr)
            size = ctypes.c_size_t()
            if rc:
                n.nvrtcGetProgramLogSize(prog, ctypes.byref(size))
                log = ctypes.create_string_buffer(size.value)
                n.nvrtcGetProgramLog(prog, log)
                sys.exit(file + ": " + log.value.decode())
            n.nvrtcGetCUBINSize(prog, ctypes.byref(size))
            cubin = ctypes.create_string_buffer(size.value)
            n.nvrtcGetCUBIN(prog, cubin)
            module = ctypes.c_void_p()
            rc = self.cu.cuModuleLoadData(ctypes.byref(module), cubin)
            assert rc == 0, f"cuModuleLoadData: {rc}"
            self.modules[key] = module
        function = ctypes.c_void_p()
        rc = self.cu.cuModuleGetFunction(ctypes.byref(function), self.modules[key], entry.encode())
        assert rc == 0, f"{entry}: {rc}"

        def launch(grid, block, shared, arguments):
            if shared > 48 * 1024:
                rc = self.cu.cuFuncSetAttribute(function, 8, shared)
                assert rc == 0, f"{entry}: {shared} bytes of shared memory: {rc}"
            ptrs = (ctypes.c_void_p * len(arguments))(*[a.at if isinstance(a, TensorMap) else ctypes.addressof(a) for a in arguments])
            grid, block = list(grid) + [1] * (3 - len(grid)), list(block) + [1] * (3 - len(block))
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            rc = self.cu.cuLaunchKernel(function, *grid, *block, shared, stream, ptrs, None)
            assert rc == 0, f"{entry} {grid} {block} {shared}: error {rc}"

        def info():
            value, out = ctypes.c_int(), {}
            for name, attr in (("regs", 4), ("local", 3)):
                self.cu.cuFuncGetAttribute(ctypes.byref(value), attr, function)
                out[name] = value.value
            return out

        launch.info = info
        return launch


class Emulated:
    """The CPU in a card's place: the kernels' text against emulate.h."""
    emulated = True

    def __init__(self, folder, sanitize, order):
        self.folder, self.sanitize, self.order = folder, sanitize, order
        self.dir = "/tmp/emulated_py"
        os.makedirs(self.dir, exist_ok=True)

    def kernel(self, file, entry, defines):
        text = "".join(f"#define {k} {v}\n" for k, v in defines.items()) + open(os.path.join(self.folder, file)).read()
        text += f"\nH1_EXPORT({entry})\n"
        every = "".join(open(os.path.join(self.folder, f)).read() for f in sorted(os.listdir(self.folder)) if not f.endswith(".cu"))
        so = f"{self.dir}/{hashlib.sha256((text + every + str(self.sanitize)).encode()).hexdigest()[:20]}.so"
        if not os.path.exists(so):
            with open(so[:-3] + ".cu", "w") as f:
                f.write(text)
            flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"] if self.sanitize else []
            subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", *flags, "-I", self.folder,
                            "-x", "c++", so[:-3] + ".cu", "-o", so], check=True)
        function = getattr(ctypes.CDLL(so), "h1_launch_" + entry)
        function.restype = ctypes.c_char_p

        def launch(grid, block, shared, arguments):
            ptrs = (ctypes.c_void_p * len(arguments))(*[a.at if isinstance(a, TensorMap) else ctypes.addressof(a) for a in arguments])
            g = (ctypes.c_uint * 3)(*(list(grid) + [1] * (3 - len(grid))))
            b = (ctypes.c_uint * 3)(*(list(block) + [1] * (3 - len(block))))
            error = function(ptrs, g, b, ctypes.c_size_t(shared), ctypes.c_uint(self.order))
            assert error is None, f"{entry}: {error}"

        launch.info = lambda: {}
        return launch
