//! Products through cuBLASLt: f32 sums, no TF32. The algorithm of a product is the first that the library's heuristic names,
//! never one that was timed. A sum may be split between blocks where its parts are f32 in the workspace and are added in their
//! order, not where blocks add to the output as they come: the same product is the same bits in every run. What was chosen is
//! kept beside the kernels, so that a resumed run has it too.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::{size_of, size_of_val};

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulAlgo_t, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtReductionScheme_t,
    cublasStatus_t, cudaDataType_t,
};

use super::driver::{Matrix, Pointer, Product};
use super::libraries;
use crate::backend::DType;
use crate::backend::cache::Cache;

/// Bytes that the library may use beside the matrices.
pub const WORKSPACE: usize = 64 << 20;

/// How a sum that is split between blocks may be put together: in f32 from the workspace.
const REDUCTIONS: u32 = cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// The library, its plans, and what is known from runs before.
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Pointer,
    plans: HashMap<Sizes, Plan>,
    recorded: HashMap<Sizes, cublasLtMatmulAlgo_t>,
    entry: String,
}

// SAFETY: handles and descriptors may be used by any thread, by one at a time.
unsafe impl Send for Blas {}

/// A factor or an output but for where it lies: dtype, stride, transposed, and the bytes that its start is a multiple of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
struct Layout(u8, usize, bool, u32);

/// All that the choice of an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
struct Sizes {
    sizes: [usize; 3],
    layouts: [Layout; 3],
    bias: bool,
    add: bool,
}

/// What the library is called with.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
}

impl Layout {
    fn of(matrix: &Matrix) -> Self {
        let alignment = 1 << (matrix.start | 256).trailing_zeros();
        Layout(matrix.dtype as u8, matrix.stride, matrix.transposed, alignment)
    }
}

impl Sizes {
    fn of(product: &Product) -> Self {
        let &Product { m, n, k, a, b, out, bias, add } = product;
        Sizes { sizes: [m, n, k], layouts: [a, b, out].map(|matrix| Layout::of(&matrix)), bias: bias != 0, add }
    }
}

fn data_type(dtype: DType) -> cudaDataType_t {
    match dtype {
        DType::Bf16 => cudaDataType_t::CUDA_R_16BF,
        DType::F16 => cudaDataType_t::CUDA_R_16F,
        _ => cudaDataType_t::CUDA_R_32F,
    }
}

fn check(status: cublasStatus_t) -> Result<(), String> {
    if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS { Ok(()) } else { Err(format!("{status:?}")) }
}

/// Whether the library is there.
pub fn present() -> Result<(), String> {
    // SAFETY: looks for the library.
    let found = libraries::preload_unless(&["libcublasLt.so"], || unsafe { sys::is_culib_present() });
    found.ok_or("cuBLASLt, the library of CUDA's toolkit for products (libcublasLt.so), was not found".into())
}

impl Blas {
    /// The library for the context that is current, with what `cache` remembers for a device.
    pub fn new(device: &str, workspace: Pointer, cache: &Cache) -> Result<Self, String> {
        present()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes a handle.
        check(unsafe { sys::cublasLtCreate(&mut handle) })?;
        // SAFETY: gives a number.
        let version = unsafe { sys::cublasLtGetVersion() }.to_string();
        let entry = Cache::name(&["products", device, &version, &WORKSPACE.to_string(), &REDUCTIONS.to_string()]);
        let known = cache.get(&entry).and_then(|bytes| serde_json::from_slice::<Vec<(Sizes, [u64; 8])>>(&bytes).ok());
        let known = known.unwrap_or_default().into_iter();
        let recorded = known.map(|(sizes, data)| (sizes, cublasLtMatmulAlgo_t { data })).collect();
        Ok(Blas { handle, workspace, plans: HashMap::new(), recorded, entry })
    }

    /// Makes a product on a stream.
    pub fn product(&mut self, product: &Product, stream: sys::cudaStream_t, cache: &Cache) -> Result<(), String> {
        let sizes = Sizes::of(product);
        if !self.plans.contains_key(&sizes) {
            let plan = self.plan(product, &sizes)?;
            if self.recorded.insert(sizes, plan.algorithm) != Some(plan.algorithm) {
                self.record(cache);
            }
            self.plans.insert(sizes, plan);
        }
        let plan = &self.plans[&sizes];
        let (one, beta) = (1.0f32, if product.add { 1.0f32 } else { 0.0 });
        let scalar = |value: &f32| std::ptr::from_ref(value).cast::<c_void>();
        let out = product.out.start as *mut c_void;
        if product.bias != 0 {
            set(plan.operation, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &product.bias)?;
        }
        // SAFETY: the descriptors are those of matrices that lie in device memory; the library's first factor is our second.
        check(unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.operation,
                scalar(&one),
                product.b.start as *const c_void,
                plan.b,
                product.a.start as *const c_void,
                plan.a,
                scalar(&beta),
                out,
                plan.out,
                out,
                plan.out,
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream,
            )
        })
        .map_err(|error| format!("{error} for {:?}", Sizes::of(product)))
    }

    fn record(&self, cache: &Cache) {
        let all: Vec<(&Sizes, [u64; 8])> =
            self.recorded.iter().map(|(sizes, algorithm)| (sizes, algorithm.data)).collect();
        if let Ok(text) = serde_json::to_vec(&all) {
            cache.put(&self.entry, &text);
        }
    }

    /// The library sees columns where we see rows, so that it makes `outᵀ[n, m] = bᵀ·aᵀ`.
    fn plan(&self, product: &Product, sizes: &Sizes) -> Result<Plan, String> {
        let &Product { m, n, k, a, b, out, .. } = product;
        let mut plan = Plan {
            operation: std::ptr::null_mut(),
            a: layout(&a, m, k)?,
            b: layout(&b, k, n)?,
            out: layout(&out, m, n)?,
            algorithm: cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let (compute, scale) = (cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType_t::CUDA_R_32F);
        // SAFETY: writes a descriptor.
        check(unsafe { sys::cublasLtMatmulDescCreate(&mut plan.operation, compute, scale) })?;
        set(plan.operation, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(b.transposed))?;
        set(plan.operation, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(a.transposed))?;
        if sizes.bias {
            let epilogue = cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            set(plan.operation, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            set(plan.operation, Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &data_type(out.dtype))?;
        }
        plan.algorithm = match self.recorded.get(sizes) {
            Some(known) if self.usable(&plan, known) => *known,
            _ => self.choose(&plan, sizes)?,
        };
        Ok(plan)
    }

    /// Whether the library still takes an algorithm.
    fn usable(&self, plan: &Plan, algorithm: &cublasLtMatmulAlgo_t) -> bool {
        let mut result = empty();
        // SAFETY: all descriptors are the library's.
        let status = unsafe {
            let Plan { operation, a, b, out, .. } = *plan;
            sys::cublasLtMatmulAlgoCheck(self.handle, operation, b, a, out, out, algorithm, &mut result)
        };
        check(status).is_ok() && result.workspaceSize <= WORKSPACE
    }

    /// The first algorithm of the heuristic whose sums have an order.
    fn choose(&self, plan: &Plan, sizes: &Sizes) -> Result<cublasLtMatmulAlgo_t, String> {
        let mut preference = std::ptr::null_mut();
        // SAFETY: writes a descriptor.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&mut preference) })?;
        let prefer = |attribute, value: &dyn Bytes| {
            let (start, size) = value.bytes();
            // SAFETY: the value is as long as it says.
            check(unsafe { sys::cublasLtMatmulPreferenceSetAttribute(preference, attribute, start, size) })
        };
        let [a, b, out] = sizes.layouts.map(|Layout(.., alignment)| alignment);
        let mut result = empty();
        let mut found = 0;
        let chosen = prefer(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)
            .and_then(|()| prefer(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &REDUCTIONS))
            .and_then(|()| prefer(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b))
            .and_then(|()| prefer(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a))
            .and_then(|()| prefer(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out))
            .and_then(|()| prefer(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out))
            .and_then(|()| {
                let (handle, operation) = (self.handle, plan.operation);
                let (a, b, out) = (plan.a, plan.b, plan.out);
                let count = &mut found;
                // SAFETY: all descriptors are the library's; there is room for one result.
                check(unsafe {
                    sys::cublasLtMatmulAlgoGetHeuristic(
                        handle,
                        operation,
                        b,
                        a,
                        out,
                        out,
                        preference,
                        1,
                        &mut result,
                        count,
                    )
                })
            });
        // SAFETY: made above.
        unsafe { sys::cublasLtMatmulPreferenceDestroy(preference) };
        chosen.map_err(|error| format!("no algorithm for {sizes:?}: {error}"))?;
        if found > 0 { Ok(result.algo) } else { Err(format!("no algorithm for {sizes:?}")) }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: descriptors of the library, made for this plan, or null.
        unsafe {
            sys::cublasLtMatmulDescDestroy(self.operation);
            for layout in [self.a, self.b, self.out] {
                sys::cublasLtMatrixLayoutDestroy(layout);
            }
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the library's own handle, which nothing uses any more.
        unsafe { sys::cublasLtDestroy(self.handle) };
    }
}

/// A plain value as the library takes it.
trait Bytes {
    fn bytes(&self) -> (*const c_void, usize);
}

impl<T: Copy> Bytes for T {
    fn bytes(&self) -> (*const c_void, usize) {
        (std::ptr::from_ref(self).cast(), size_of_val(self))
    }
}

fn set(operation: sys::cublasLtMatmulDesc_t, attribute: Attribute, value: &dyn Bytes) -> Result<(), String> {
    let (start, size) = value.bytes();
    // SAFETY: the value is as long as it says.
    check(unsafe { sys::cublasLtMatmulDescSetAttribute(operation, attribute, start, size) })
}

/// The library's view of a matrix `[rows, cols]`: what lies in memory, in columns.
fn layout(matrix: &Matrix, rows: usize, cols: usize) -> Result<sys::cublasLtMatrixLayout_t, String> {
    let (lines, width) = if matrix.transposed { (cols, rows) } else { (rows, cols) };
    let mut layout = std::ptr::null_mut();
    let (dtype, stride) = (data_type(matrix.dtype), matrix.stride.max(width) as i64);
    // SAFETY: writes a descriptor.
    check(unsafe { sys::cublasLtMatrixLayoutCreate(&mut layout, dtype, width as u64, lines as u64, stride) })?;
    Ok(layout)
}

fn empty() -> cublasLtMatmulHeuristicResult_t {
    const { assert!(size_of::<cublasLtMatmulAlgo_t>() == 64) };
    cublasLtMatmulHeuristicResult_t {
        algo: cublasLtMatmulAlgo_t { data: [0; 8] },
        workspaceSize: 0,
        state: cublasStatus_t::CUBLAS_STATUS_SUCCESS,
        wavesCount: 0.0,
        reserved: [0; 4],
    }
}
