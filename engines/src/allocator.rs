//! How the C library's allocator treats large blocks.
//!
//! glibc asks the kernel for every block beyond 32 MiB anew and gives it back when it is freed.
//! Matrices of large layers are such blocks, made and dropped by the dozen: zeroing their pages took
//! more time than the mathematics (converting GPT-OSS-20B: 51 s of system time, 19 s with this).

/// Blocks up to this size come from memory that the process keeps.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT: libc::c_int = 1 << 30;

/// Lets the process keep up to 1 GiB of freed memory for its next large blocks. Call it once, before
/// there are other threads.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "two settings of the C library")]
pub fn keep_large_blocks() {
    // SAFETY: mallopt takes any value of these parameters and says whether it took it; without it
    // allocation is slower and nothing else changes.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Other C libraries keep their ways.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_large_blocks() {}
