//! The `peft` command.

/// Tensors are freed and allocated all the time; mimalloc keeps their pages.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    peft::cli::main()
}
