//! The `peft` command.

/// Tensors are freed and allocated all the time; mimalloc keeps their pages.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // candle keeps a second pool whose threads spin while they wait and take the cores from the
    // first (12 % of a step on two cores). Its size follows this variable; ours is set explicitly.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    peft::cli::main()
}
