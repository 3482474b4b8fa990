//! VM and vCPU records: a buddy heap over pages that the hypervisor owns.
//!
//! This is one of the few places outside `arch/` with unsafe code: it turns raw heap memory into typed
//! [`Record`]s. The rule that makes it sound: memory enters the heap once, in [`Records::add`], for ever; a
//! record is the only pointer to its block until [`Records::free`] takes it back.

#![expect(unsafe_code, reason = "raw heap memory becomes typed records here")]

use super::Lacking;
use crate::addr::PAGE_SIZE;
use crate::machine::Machine;
use crate::sync::{Lock, Mutex};
use abi::page::Pool;
use core::alloc::Layout;
use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

/// Largest block: 2^(ORDER-1) bytes. Records are far smaller; this bounds what a top-up may add at once.
const ORDER: usize = 24;

/// The heap of records, behind its own lock, the last in the lock order.
pub struct Records {
    heap: Mutex<buddy_system_allocator::Heap<ORDER>>,
}

/// A record on the heap. It must go back to the heap that it came from; one that is dropped instead is never
/// used again, which loses memory but no safety.
pub struct Record<T> {
    value: NonNull<T>,
}

// SAFETY: a record is the unique owner of its value, as a `Box` is; moving it to another CPU moves the value.
unsafe impl<T: Send> Send for Record<T> {}
// SAFETY: `&Record<T>` gives only `&T`.
unsafe impl<T: Sync> Sync for Record<T> {}

impl Records {
    /// A heap without memory.
    pub const fn new() -> Self {
        Self { heap: Mutex::new(Lock::Records, buddy_system_allocator::Heap::empty()) }
    }

    /// Adds memory to the heap, for ever.
    ///
    /// # Safety
    /// `start` points to `bytes` bytes that are mapped, writable and from now on used by nobody else.
    pub unsafe fn add(&self, start: NonNull<u8>, bytes: usize) {
        let start = start.as_ptr() as usize;
        // SAFETY: the caller hands the range over; its end cannot overflow, being the end of an object.
        unsafe { self.heap.lock().add_to_heap(start, start.saturating_add(bytes)) };
    }

    /// Puts a value on the heap.
    ///
    /// # Errors
    /// How many pages, contiguous and aligned to their own number, will do.
    pub fn alloc<T>(&self, value: T) -> Result<Record<T>, Lacking> {
        let layout = Layout::new::<T>();
        let pages = (layout.size() as u64).div_ceil(PAGE_SIZE).next_power_of_two();
        let lacking = Lacking { pool: Pool::Metadata, pages };
        #[cfg(any(test, feature = "sim"))]
        if crate::testing::failure::refuses(Pool::Metadata, 1) {
            return Err(lacking);
        }
        let place: NonNull<T> = self.take(layout).ok_or(lacking)?.cast();
        // SAFETY: the heap gave a block of T's size and alignment that nobody else uses.
        unsafe { place.write(value) };
        Ok(Record { value: place })
    }

    #[inline(never)]
    fn take(&self, layout: Layout) -> Option<NonNull<u8>> {
        self.heap.lock().alloc(layout).ok()
    }

    /// Takes a record back and zeroes its block, in memory too, so that no register of a guest stays behind.
    pub fn free<T, M: Machine>(&self, machine: &M, record: Record<T>) {
        let place = record.value;
        // SAFETY: the record owns its value and is consumed here; nobody can reach the value after this.
        unsafe { place.drop_in_place() };
        // SAFETY: the block is T's size and holds no value any more.
        unsafe { place.write_bytes(0, 1) };
        machine.clean_record(place.as_ptr().cast(), size_of::<T>());
        // SAFETY: the block came from this heap with T's layout: records are made by `alloc` only.
        unsafe { self.put_back(place.cast(), Layout::new::<T>()) };
    }

    /// # Safety
    /// The block came from this heap with this layout, and nobody uses it any more.
    #[inline(never)]
    unsafe fn put_back(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: as the caller says.
        unsafe { self.heap.lock().dealloc(block, layout) };
    }

    /// Bytes in use by records.
    pub fn used(&self) -> u64 {
        self.heap.lock().stats_alloc_user() as u64
    }
}

impl Default for Records {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Records")
    }
}

impl<T> Deref for Record<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the record owns a value that was written when it was made.
        unsafe { self.value.as_ref() }
    }
}

impl<T> DerefMut for Record<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { self.value.as_mut() }
    }
}

impl<T: fmt::Debug> fmt::Debug for Record<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMachine;

    fn heap(bytes: usize) -> Records {
        let records = Records::new();
        let memory = Vec::leak(vec![0u64; bytes / 8]);
        // SAFETY: the memory is leaked to the heap.
        unsafe { records.add(NonNull::from(&mut memory[0]).cast(), bytes) };
        records
    }

    #[test]
    fn a_record_keeps_its_value_and_gives_its_memory_back() {
        let records = heap(4096);
        let mut record = records.alloc([7u64; 16]).unwrap();
        record[3] = 9;
        assert_eq!(record[3], 9);
        assert_eq!(records.used(), 128);
        records.free(&TestMachine::new(), record);
        assert_eq!(records.used(), 0);
    }

    #[test]
    fn a_full_heap_says_how_many_pages_will_do() {
        let records = Records::new();
        assert_eq!(records.alloc([0u8; 5000]).err(), Some(Lacking { pool: Pool::Metadata, pages: 2 }));
        assert_eq!(records.alloc(0u8).err(), Some(Lacking { pool: Pool::Metadata, pages: 1 }));
    }

    #[test]
    fn a_freed_block_holds_nothing_of_its_record() {
        let records = heap(4096);
        let record = records.alloc([0xa5u8; 256]).unwrap();
        let place = record.value;
        records.free(&TestMachine::new(), record);
        // SAFETY: the block is still memory of the (leaked) heap. Its first words are the heap's links.
        let tail = unsafe { place.as_ref() };
        assert!(tail[16..].iter().all(|byte| *byte == 0));
    }
}
