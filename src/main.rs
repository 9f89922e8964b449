//! The `peft` command.

/// Tensors are freed and allocated all the time; mimalloc keeps their pages.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    peft::guard::hush();
    peft::cli::main()
}
