//! Libraries that panic on broken input instead of saying so.

use std::cell::Cell;

thread_local! {
    static GUARDED: Cell<usize> = const { Cell::new(0) };
}

/// What `run` returns; nothing where it panics.
pub(crate) fn guarded<T>(run: impl FnOnce() -> T) -> Option<T> {
    GUARDED.with(|depth| depth.set(depth.get() + 1));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    GUARDED.with(|depth| depth.set(depth.get() - 1));
    result.ok()
}

/// Keeps panics that become errors from being printed: a program calls it once, before anything else.
pub fn hush() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if GUARDED.with(Cell::get) == 0 {
            print(info);
        }
    }));
}
