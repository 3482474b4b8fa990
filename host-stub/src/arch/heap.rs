//! The kernel's heap: for its books, not for pages.

use core::alloc::{GlobalAlloc, Layout};
use core::ops::Range;
use core::ptr::NonNull;

use buddy_system_allocator::Heap;
use spin::Mutex;

const ORDERS: usize = 32;

struct KernelHeap(Mutex<Heap<ORDERS>>);

#[global_allocator]
static HEAP: KernelHeap = KernelHeap(Mutex::new(Heap::empty()));

// SAFETY: the buddy allocator hands out disjoint blocks of the memory that `start` gave it, each at least as
// large and aligned as its layout asks; the lock orders calls.
unsafe impl GlobalAlloc for KernelHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.lock().alloc(layout).map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if let Some(pointer) = NonNull::new(pointer) {
            // SAFETY: by the contract of this trait the block came from `alloc` with this layout.
            unsafe { self.0.lock().dealloc(pointer, layout) };
        }
    }
}

/// Gives the heap its memory.
///
/// # Safety
///
/// The addresses are mapped, and nothing else uses them, ever.
pub unsafe fn start(memory: Range<u64>) {
    // SAFETY: the caller's promise.
    unsafe { HEAP.0.lock().add_to_heap(memory.start as usize, memory.end as usize) };
}
