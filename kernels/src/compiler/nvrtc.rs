//! NVRTC, opened at run time.
#![expect(unsafe_code, reason = "loading a library and calling its entry points")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use mlac_model::Refusal;

use super::{Backend, Compiled, Compiler, CompilerName, FILE, MAJOR, options, size, without_times};
use crate::arch::Arch;
use crate::error::{KernelError, Result};
use crate::source::{HEADERS, Source};
use crate::toolchain::Toolchain;

type Program = *mut c_void;
type Code = c_int;

/// The entry points, with the signatures of CUDA 13.0's `nvrtc.h`.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code,
    destroy: unsafe extern "C" fn(*mut Program) -> Code,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Code,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Code,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    error: unsafe extern "C" fn(Code) -> *const c_char,
}

/// The library, loaded.
pub(super) struct Nvrtc {
    functions: Functions,
    // Dropped last: the functions point into them.
    _libraries: [Library; 2],
}

fn open(path: &Path, flags: c_int) -> Result<Library> {
    // SAFETY: NVRTC's libraries have no initialiser with preconditions; they were found at the place that set-up or the user chose.
    unsafe { Library::open(Some(path), flags) }.map_err(|error| {
        Refusal::new(
            path.display().to_string(),
            "a shared library for Linux x86_64",
            error.to_string(),
            "run `cargo xtask setup` again, or correct MLAC_CUDA",
        )
        .into()
    })
}

/// A symbol as the function type that the caller names.
///
/// # Safety
/// The symbol must be of that type and is not called after the library is closed.
unsafe fn symbol<F: Copy>(library: &Library, path: &Path, name: &str) -> Result<F> {
    // SAFETY: the caller's promise.
    match unsafe { library.get::<F>(name.as_bytes()) } {
        Ok(found) => Ok(*found),
        Err(error) => Err(Refusal::new(
            path.display().to_string(),
            format!("NVRTC 13 with {name}"),
            error.to_string(),
            "run `cargo xtask setup` again, or correct MLAC_CUDA",
        )
        .into()),
    }
}

impl Nvrtc {
    /// Loads the toolchain's NVRTC.
    pub(super) fn load(toolchain: &Toolchain) -> Result<Compiler> {
        // NVRTC opens its builtins by name; loaded first, they are found wherever they lie.
        let builtins = open(&toolchain.builtins(), RTLD_NOW | RTLD_GLOBAL)?;
        let path = toolchain.nvrtc();
        let library = open(&path, RTLD_NOW)?;
        // SAFETY: the types are those of nvrtc.h, unchanged through CUDA 12 and 13; the libraries live as long as `Self`.
        let functions = unsafe {
            Functions {
                version: symbol(&library, &path, "nvrtcVersion")?,
                create: symbol(&library, &path, "nvrtcCreateProgram")?,
                compile: symbol(&library, &path, "nvrtcCompileProgram")?,
                destroy: symbol(&library, &path, "nvrtcDestroyProgram")?,
                log_size: symbol(&library, &path, "nvrtcGetProgramLogSize")?,
                log: symbol(&library, &path, "nvrtcGetProgramLog")?,
                cubin_size: symbol(&library, &path, "nvrtcGetCUBINSize")?,
                cubin: symbol(&library, &path, "nvrtcGetCUBIN")?,
                error: symbol(&library, &path, "nvrtcGetErrorString")?,
            }
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two places to write to.
        unsafe { (functions.version)(&raw mut major, &raw mut minor) };
        if u32::try_from(major) != Ok(MAJOR) {
            return Err(Refusal::new(
                path.display().to_string(),
                format!("NVRTC {MAJOR}"),
                format!("NVRTC {major}.{minor}"),
                "run `cargo xtask setup`, or set MLAC_CUDA to CUDA 13.0",
            )
            .into());
        }
        let version = format!("{major}.{minor}");
        // NVRTC tells no patch number.
        let identity = format!(
            "{} {version}, {} and {} bytes",
            CompilerName::Nvrtc,
            size(&path)?,
            size(&toolchain.builtins())?
        );
        Ok(Compiler {
            version,
            identity,
            backend: Backend::Nvrtc(Self {
                functions,
                _libraries: [library, builtins],
            }),
        })
    }

    fn error(&self, kernel: &str, action: &'static str, code: Code, log: String) -> KernelError {
        // SAFETY: NVRTC returns a static string for every code.
        let code = unsafe { CStr::from_ptr((self.functions.error)(code)) };
        KernelError::Compile {
            kernel: kernel.to_owned(),
            compiler: CompilerName::Nvrtc,
            action,
            code: code.to_string_lossy().into_owned(),
            log,
        }
    }

    pub(super) fn compile(&self, kernel: &str, source: &Source, arch: Arch) -> Result<Compiled> {
        let text = |text: &str| {
            CString::new(text).map_err(|_| {
                KernelError::from(Refusal::new(
                    format!("source of {kernel}"),
                    "text without NUL",
                    "a NUL byte",
                    "report it: the source is part of mlac",
                ))
            })
        };
        let source_text = text(&source.text)?;
        let name = text(FILE)?;
        let header_texts = HEADERS
            .iter()
            .map(|(_, body)| text(body))
            .collect::<Result<Vec<_>>>()?;
        let header_names = HEADERS
            .iter()
            .map(|(name, _)| text(name))
            .collect::<Result<Vec<_>>>()?;
        let flags = options(arch)
            .iter()
            .map(|flag| text(flag))
            .collect::<Result<Vec<_>>>()?;
        let pointers = |texts: &[CString]| texts.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
        let bodies = pointers(&header_texts);
        let names = pointers(&header_names);
        let flag_pointers = pointers(&flags);

        let mut program = Guard {
            nvrtc: self,
            program: ptr::null_mut(),
        };
        // SAFETY: every pointer is to a NUL-terminated text, or to an array of them, that outlives the call.
        let code = unsafe {
            (self.functions.create)(
                &raw mut program.program,
                source_text.as_ptr(),
                name.as_ptr(),
                bodies.len() as c_int,
                bodies.as_ptr(),
                names.as_ptr(),
            )
        };
        if code != 0 {
            return Err(self.error(kernel, "take the source", code, String::new()));
        }
        // SAFETY: the program was created; the flags outlive the call.
        let code = unsafe {
            (self.functions.compile)(
                program.program,
                flag_pointers.len() as c_int,
                flag_pointers.as_ptr(),
            )
        };
        let log = program.bytes(
            kernel,
            "give its log",
            self.functions.log_size,
            self.functions.log,
        )?;
        let log = String::from_utf8_lossy(&log);
        let log = without_times(log.trim_end_matches('\0'));
        if code != 0 {
            return Err(self.error(kernel, "compile", code, log));
        }
        let cubin = program.bytes(
            kernel,
            "give the cubin",
            self.functions.cubin_size,
            self.functions.cubin,
        )?;
        Ok(Compiled { cubin, log })
    }
}

struct Guard<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Guard<'_> {
    fn bytes(
        &self,
        kernel: &str,
        action: &'static str,
        size: unsafe extern "C" fn(Program, *mut usize) -> Code,
        get: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    ) -> Result<Vec<u8>> {
        let mut count = 0;
        // SAFETY: the program exists and there is a place for the size.
        let code = unsafe { size(self.program, &raw mut count) };
        if code != 0 {
            return Err(self.nvrtc.error(kernel, action, code, String::new()));
        }
        let mut bytes = vec![0_u8; count];
        // SAFETY: the buffer has the size that NVRTC asked for.
        let code = unsafe { get(self.program, bytes.as_mut_ptr().cast()) };
        if code != 0 {
            return Err(self.nvrtc.error(kernel, action, code, String::new()));
        }
        Ok(bytes)
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: created by this library, destroyed once.
            unsafe { (self.nvrtc.functions.destroy)(&raw mut self.program) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A toolchain whose `libnvrtc.so.13` is `nvrtc` and whose builtins are the real ones.
    fn with_nvrtc(nvrtc: &Path) -> String {
        let real = Toolchain::find().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for file in [
            real.nvrtc(),
            real.builtins(),
            real.cuobjdump(),
            real.nvdisasm(),
        ] {
            let below = file.strip_prefix(real.folder()).unwrap();
            let place = folder.path().join(below);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            let from = if file == real.nvrtc() { nvrtc } else { &file };
            fs::copy(from, place).unwrap();
        }
        let toolchain = Toolchain::among(Some(folder.path()), &[]).unwrap();
        Nvrtc::load(&toolchain).err().unwrap().to_string()
    }

    #[test]
    fn a_file_that_is_no_compiler_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text");
        fs::write(&text, "not a library").unwrap();
        let error = with_nvrtc(&text);
        assert!(error.contains("expected a shared library"), "{error}");
        let other = Toolchain::find().unwrap().builtins();
        let error = with_nvrtc(&other);
        assert!(
            error.contains("expected NVRTC 13 with nvrtcVersion"),
            "{error}"
        );
    }
}
