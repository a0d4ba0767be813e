//! NVRTC: the text of a kernel to the code of an architecture.

use std::ffi::{CStr, CString, c_char};

use cudarc::nvrtc::sys::{self, nvrtcResult};

use super::libraries;

/// What every kernel is compiled with. Sums and products may fuse; nothing else is approximate.
const FLAGS: [&str; 3] = ["--std=c++17", "-default-device", "--ptxas-options=-v"];

/// The compiler's version, as CUDA's major and minor number.
///
/// # Errors
/// When there is no compiler.
pub fn version() -> Result<(u32, u32), String> {
    libraries::preload_unless(&["libnvrtc-builtins.so", "libnvrtc.so"], || {
        // SAFETY: looks for the library.
        unsafe { sys::is_culib_present() }
    })
    .ok_or("NVRTC, the compiler of CUDA's toolkit (libnvrtc.so), was not found")?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    check(unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
    Ok((major.unsigned_abs(), minor.unsigned_abs()))
}

/// The architecture of a device as the compiler names it, with what this generation alone has.
pub fn architecture((major, minor): (u32, u32)) -> String {
    let own = if (major, minor) == (9, 0) || major >= 10 { "a" } else { "" };
    format!("sm_{major}{minor}{own}")
}

/// All that decides what the compiler gives for a text, but for the text.
pub fn identity((major, minor): (u32, u32), architecture: &str) -> String {
    format!("{major}.{minor} {architecture} {}", FLAGS.join(" "))
}

/// The code of a module, and what the compiler says of it: registers, shared memory and spills of each kernel.
#[derive(Debug)]
pub struct Compiled {
    /// The code.
    pub cubin: Vec<u8>,
    /// The compiler's words.
    pub log: String,
}

/// Compiles a text to a cubin. Headers are pairs of name and text.
///
/// # Errors
/// What the compiler said.
pub fn compile(text: &str, headers: &[(&str, &str)], architecture: &str) -> Result<Compiled, String> {
    let c_text = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let names = headers.iter().map(|(name, _)| c_text(name)).collect::<Result<Vec<_>, _>>()?;
    let texts = headers.iter().map(|(_, text)| c_text(text)).collect::<Result<Vec<_>, _>>()?;
    let pointers = |strings: &[CString]| strings.iter().map(|string| string.as_ptr()).collect::<Vec<*const c_char>>();
    let (name_pointers, text_pointers) = (pointers(&names), pointers(&texts));
    let source = c_text(text)?;
    let options = FLAGS.into_iter().map(str::to_owned).chain([format!("--gpu-architecture={architecture}")]);
    let options = options.map(|option| c_text(&option)).collect::<Result<Vec<_>, _>>()?;
    let option_pointers = pointers(&options);

    let mut program = Program(std::ptr::null_mut());
    let count = i32::try_from(headers.len()).map_err(|error| error.to_string())?;
    // SAFETY: the strings live as long as the program.
    unsafe {
        let (texts, names) = (text_pointers.as_ptr(), name_pointers.as_ptr());
        check(sys::nvrtcCreateProgram(&mut program.0, source.as_ptr(), c"kernel.cu".as_ptr(), count, texts, names))?;
        let result = sys::nvrtcCompileProgram(program.0, option_pointers.len() as i32, option_pointers.as_ptr());
        if result != nvrtcResult::NVRTC_SUCCESS {
            return Err(program.log().filter(|log| !log.is_empty()).unwrap_or(message(result)));
        }
        let mut size = 0;
        check(sys::nvrtcGetCUBINSize(program.0, &mut size))?;
        let mut cubin = vec![0u8; size];
        check(sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()))?;
        Ok(Compiled { cubin, log: program.log().unwrap_or_default() })
    }
}

/// A program, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Program {
    /// What the compiler wrote.
    fn log(&self) -> Option<String> {
        let mut size = 0;
        // SAFETY: the program is one; the buffer has the size that the library asks for.
        unsafe {
            check(sys::nvrtcGetProgramLogSize(self.0, &mut size)).ok()?;
            let mut log = vec![0u8; size];
            check(sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast())).ok()?;
            Some(String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned())
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: a program of the library, or null.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn message(result: nvrtcResult) -> String {
    // SAFETY: a text with an end, of the library.
    unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) }.to_string_lossy().into_owned()
}

fn check(result: nvrtcResult) -> Result<(), String> {
    if result == nvrtcResult::NVRTC_SUCCESS { Ok(()) } else { Err(message(result)) }
}
