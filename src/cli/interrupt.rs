//! Ctrl-C: the first asks to stop after the present step, the second ends the program.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// The exit code of a program that was interrupted.
pub(super) const EXIT_CODE: u8 = 130;

/// Whether a stop was asked for.
pub(super) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// From now on an interrupt or a request to terminate is a request to stop; a second one of the same kind ends the
/// program.
#[cfg(unix)]
pub(super) fn listen() {
    extern "C" fn ask(_signal: libc::c_int) {
        ASKED.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler does nothing but store to an atomic, which is allowed in a signal handler; the struct is
        // plain data for which all zeros is a valid value.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ask as extern "C" fn(libc::c_int) as libc::sighandler_t;
            action.sa_flags = libc::SA_RESETHAND | libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Elsewhere an interrupt ends the program at once; the latest checkpoint is whole all the same.
#[cfg(not(unix))]
pub(super) fn listen() {}
