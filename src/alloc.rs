//! Weights that processes share, and what happens when memory ends: a wrapper around a program's allocator.
//!
//! Tensors on the CPU own vectors, and a vector gives its memory to the global allocator. [`Allocator`] knows which blocks are pages
//! of a file, so that a vector can hold those too: a base's weights then stand once in memory, in the system's file cache, however
//! many processes read them. A program that installs it gets this; any other gets copies.
//!
//! ```standalone_crate
//! #[global_allocator]
//! static ALLOCATOR: peft::alloc::Allocator<std::alloc::System> = peft::alloc::Allocator(std::alloc::System);
//! # fn main() -> peft::Result<()> {
//! let base = peft::Model::load("builtin:tiny")?;
//! # Ok(())
//! # }
//! ```

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[cfg(unix)]
pub(crate) use pages::floats;

/// Blocks of fewer bytes are copied: a page or two is no gain, and the allocator has to look up only large blocks.
const LEAST: usize = 1 << 16;

/// Bytes of vectors that are pages of files now.
static MAPPED: AtomicUsize = AtomicUsize::new(0);
/// Whether memory has ended.
static EXHAUSTED: AtomicBool = AtomicBool::new(false);

/// How many bytes of vectors are pages of files: nobody's own, and given back by the system when others want memory.
#[must_use]
pub fn mapped() -> usize {
    MAPPED.load(Ordering::Acquire)
}

/// Allocates as `A` does.
#[derive(Debug)]
pub struct Allocator<A>(pub A);

/// Whether an allocation was refused. Who asked for it may have gone on in another way.
#[must_use]
pub fn exhausted() -> bool {
    EXHAUSTED.load(Ordering::Relaxed)
}

/// No pages can be had.
#[cfg(not(unix))]
pub(crate) fn floats(_: &std::fs::File, _: u64, _: usize) -> Option<Vec<f32>> {
    None
}

fn noted(block: *mut u8) -> *mut u8 {
    if block.is_null() {
        EXHAUSTED.store(true, Ordering::Relaxed);
    }
    block
}

#[cfg(unix)]
fn may_be_mapped(size: usize) -> bool {
    size >= LEAST && mapped() > 0
}

// SAFETY: blocks are `A`'s, apart from those that `pages::floats` hands out, which never reach `A`: what is large enough to be one
// is looked up by its address before it is freed or grown. Nothing here unwinds.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Allocator<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        #[cfg(unix)]
        pages::seen(layout);
        // SAFETY: as the caller promises.
        noted(unsafe { self.0.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        noted(unsafe { self.0.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        #[cfg(unix)]
        if may_be_mapped(layout.size()) && pages::free(block) {
            return;
        }
        // SAFETY: not a mapped block, so one of `A`'s.
        unsafe { self.0.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        #[cfg(unix)]
        if may_be_mapped(layout.size()) && pages::is(block) {
            // SAFETY: `size` is not zero and fits, as the caller promises; both blocks have the bytes that are copied.
            unsafe {
                let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
                if !new.is_null() {
                    std::ptr::copy_nonoverlapping(block, new, layout.size().min(size));
                    pages::free(block);
                }
                return new;
            }
        }
        // SAFETY: not a mapped block, so one of `A`'s.
        noted(unsafe { self.0.realloc(block, layout, size) })
    }
}

#[cfg(unix)]
mod pages {
    use std::alloc::Layout;
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

    use memmap2::{MmapMut, MmapOptions};

    use super::{LEAST, MAPPED};

    /// Mappings by the address of their first value.
    static RANGES: Mutex<BTreeMap<usize, MmapMut>> = Mutex::new(BTreeMap::new());
    /// Whether [`super::Allocator`] is the program's.
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    /// Nobody else asks for a block like this one.
    const PROBE: (usize, usize) = (4099, 2048);

    fn ranges() -> MutexGuard<'static, BTreeMap<usize, MmapMut>> {
        RANGES.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The allocator tells which block it is asked for.
    pub(super) fn seen(layout: Layout) {
        if layout.size() == PROBE.0 && layout.align() == PROBE.1 {
            INSTALLED.store(true, Ordering::Release);
        }
    }

    /// Asks the global allocator for a block and looks whether it was ours that was asked.
    fn installed() -> bool {
        static ANSWER: OnceLock<bool> = OnceLock::new();
        *ANSWER.get_or_init(|| {
            let Ok(layout) = Layout::from_size_align(PROBE.0, PROBE.1) else { return false };
            // SAFETY: a layout that is not empty; the block is freed with it.
            unsafe {
                let block = std::hint::black_box(std::alloc::alloc(layout));
                if !block.is_null() {
                    std::alloc::dealloc(block, layout);
                }
            }
            INSTALLED.load(Ordering::Acquire)
        })
    }

    pub(super) fn is(block: *mut u8) -> bool {
        ranges().contains_key(&(block as usize))
    }

    /// Whether it was a mapping; it is none any more.
    pub(super) fn free(block: *mut u8) -> bool {
        let Some(mapping) = ranges().remove(&(block as usize)) else { return false };
        MAPPED.fetch_sub(mapping.len(), Ordering::AcqRel);
        true
    }

    /// `count` values that lie in `file` from byte `from`, as pages of the file; nothing where that cannot be, or is not worth it.
    /// What is written to them stays in this process. The caller has seen that the file has so many bytes.
    pub(crate) fn floats(file: &File, from: u64, count: usize) -> Option<Vec<f32>> {
        let bytes = count.checked_mul(size_of::<f32>())?;
        if bytes < LEAST || cfg!(target_endian = "big") || !installed() {
            return None;
        }
        // SAFETY: the mapping is private, so nobody sees a change made here. Who cuts the file off while it is mapped ends this
        // process with SIGBUS; files of the hub's cache and those that we write are replaced by renames, which leaves mappings whole.
        let mut mapping = unsafe { MmapOptions::new().offset(from).len(bytes).map_copy(file) }.ok()?;
        let first = mapping.as_mut_ptr().cast::<f32>();
        if !first.is_aligned() {
            return None;
        }
        MAPPED.fetch_add(bytes, Ordering::AcqRel);
        ranges().insert(first as usize, mapping);
        // SAFETY: the pages hold `count` values, any bits are one, and they are aligned. They are the vector's alone until it gives
        // them back to the global allocator, which is `Allocator` and finds them above.
        Some(unsafe { Vec::from_raw_parts(first, count, count) })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[cfg(unix)]
mod tests {
    use std::alloc::System;
    use std::io::Write as _;

    use super::*;

    #[global_allocator]
    static ALLOCATOR: Allocator<System> = Allocator(System);

    const COUNT: usize = 50_000;

    /// A file of numbers after eight bytes of something else.
    fn numbers() -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 8]).unwrap();
        let values: Vec<f32> = (0..COUNT).map(|i| i as f32).collect();
        file.write_all(bytemuck::cast_slice(&values)).unwrap();
        file
    }

    /// The parts of this process that are pages of a file.
    fn parts(file: &tempfile::NamedTempFile) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|l| l.ends_with(&*file.path().to_string_lossy())).count()
    }

    #[test]
    fn a_vector_of_a_files_pages_is_a_vector() {
        let file = numbers();
        let mut values = floats(file.as_file(), 8, COUNT).unwrap();
        let copy = values.clone();
        assert_eq!((values.len(), values[0], values[COUNT - 1]), (COUNT, 0.0, (COUNT - 1) as f32));
        if cfg!(target_os = "linux") {
            assert_eq!(parts(&file), 1);
        }
        values[7] = -1.0;
        assert_eq!(std::fs::read(file.path()).unwrap()[8 + 28..8 + 32], 7f32.to_le_bytes());
        // Grown and shrunk it moves to the allocator behind.
        values.push(5.0);
        assert_eq!((values[7], values[COUNT], values.len()), (-1.0, 5.0, COUNT + 1));
        if cfg!(target_os = "linux") {
            assert_eq!(parts(&file), 0);
        }
        values.truncate(COUNT);
        values[7] = 7.0;
        assert_eq!(values, copy);
    }

    #[test]
    fn pages_are_given_back() {
        let file = numbers();
        let both = [floats(file.as_file(), 8, COUNT).unwrap(), floats(file.as_file(), 8 + 4, COUNT - 1).unwrap()];
        assert_eq!(both[0][1], both[1][0]);
        if cfg!(target_os = "linux") {
            assert_eq!(parts(&file), 2);
            drop(both);
            assert_eq!(parts(&file), 0);
        }
    }

    #[test]
    fn what_is_small_or_lies_askew_is_copied() {
        let file = numbers();
        assert!(floats(file.as_file(), 8, 100).is_none());
        assert!(floats(file.as_file(), 9, COUNT - 1).is_none());
        assert_eq!(parts(&file), 0);
    }

    #[test]
    fn memory_that_is_refused_is_noted() {
        let mut much = Vec::<u8>::new();
        assert!(much.try_reserve_exact(isize::MAX as usize).is_err() && exhausted());
    }
}
