//! The `peft` command.

use peft::alloc::Allocator;

/// Tensors are freed and allocated all the time; mimalloc keeps their pages. A base's weights are pages of its file.
#[global_allocator]
static ALLOCATOR: Allocator<mimalloc::MiMalloc> = Allocator(mimalloc::MiMalloc);

/// mimalloc's `purge_delay`: how long freed pages stay, in milliseconds; the crate has no name for it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

#[allow(unsafe_code, reason = "settings of the process, before it has other threads")]
fn main() -> std::process::ExitCode {
    // Pages that are given back are cleared by the kernel when they are wanted again, which was a
    // third of a training step. Kept, resident memory stays at its peak.
    // SAFETY: an option of the allocator, set before any other thread runs.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    // candle keeps a second pool whose threads spin while they wait and take the cores from the
    // first (12 % of a step on two cores). Its size follows this variable; ours is set explicitly.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    // What the C library itself asks for, such as a thread's list of destructors, comes from the heap that is there from the start.
    // By default each thread reserves 64 MiB of addresses for that, and where these cannot be had (ulimit -v) glibc aborts.
    // SAFETY: an option of the allocator, set before any other thread runs.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        answer_exhaustion();
        answer_full();
    }
    peft::guard::hush();
    peft::cli::main()
}

/// Where memory has ended the standard library says how many bytes were asked for and aborts. What to do belongs to that, and the
/// exit code of a fault of the machine.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
#[allow(unsafe_code, reason = "a signal's handler")]
fn answer_exhaustion() {
    const HINT: &[u8] = b"error: memory: there is not so much left for this process\n  help: what is on disk is whole; ask for less \
(fewer --threads, a smaller train.batch, train.checkpointing: true), or raise the limit (ulimit -v, the container's)\n";
    let answer = || {
        if peft::alloc::exhausted() {
            let _ = rustix::io::write(rustix::stdio::stderr(), HINT);
            signal_hook::low_level::exit(3);
        }
    };
    // SAFETY: the handler reads an atomic, writes to a file descriptor and ends the process: all of it may be done in a handler.
    let _ = unsafe { signal_hook::low_level::register(signal_hook::consts::SIGABRT, answer) };
}

/// A write beyond the largest allowed file (`ulimit -f`) is an error like any other, and no reason to end at once.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
#[allow(unsafe_code, reason = "a signal's handler")]
fn answer_full() {
    // SAFETY: the handler does nothing.
    let _ = unsafe { signal_hook::low_level::register(signal_hook::consts::SIGXFSZ, || ()) };
}
