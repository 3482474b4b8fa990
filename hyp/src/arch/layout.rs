//! Where the parts of the image lie, as the linker script names them, and the stacks.

use crate::addr::{PAGE_SIZE, Pages, Pfn};
use crate::cpus::MAX_CPUS;
use core::cell::UnsafeCell;

/// Bytes of a stack. With 8 KiB all boots pass as well, the oracle's among them.
pub const STACK_SIZE: usize = 12 * 1024;
/// Bytes of the unmapped page under each stack.
pub const GUARD_SIZE: usize = PAGE_SIZE as usize;

/// A stack, which grows down towards its guard page.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Stack {
    guard: UnsafeCell<[u8; GUARD_SIZE]>,
    memory: UnsafeCell<[u8; STACK_SIZE]>,
}

// SAFETY: no Rust reference to the bytes of a stack exists. One CPU alone uses a stack, through SP, and
// `forget_guests` writes to those that none uses.
unsafe impl Sync for Stack {}

impl Stack {
    const fn new() -> Self {
        Self { guard: UnsafeCell::new([0; GUARD_SIZE]), memory: UnsafeCell::new([0; STACK_SIZE]) }
    }
}

/// The stacks of all CPUs. CPU n serves its host on stack n, and has a guest on its guest stack, which is stack
/// [`GUEST_STACKS`] + n. Not zeroed at boot.
// SAFETY (of the section): it is writable, page aligned and loaded as no-bits by linker/hyp.ld.
#[unsafe(link_section = ".stacks")]
pub static STACKS: [Stack; 2 * MAX_CPUS] = [const { Stack::new() }; 2 * MAX_CPUS];
/// Index of the first guest stack: registers of guests that the host is not shown are on no other.
pub const GUEST_STACKS: usize = MAX_CPUS;

macro_rules! linker_symbols {
    ($($(#[$doc:meta])* $name:ident: $start:ident .. $end:ident;)*) => {
        unsafe extern "C" {
            $(safe static $start: [u8; 0]; safe static $end: [u8; 0];)*
        }
        $(
            $(#[$doc])*
            pub fn $name() -> Pages<Pfn> {
                span((&raw const $start).addr(), (&raw const $end).addr())
            }
        )*
    };
}

linker_symbols! {
    /// The whole image: all that is the hypervisor's from the start.
    image: __image_start .. __image_end;
    /// Code.
    text: __text_start .. __text_end;
    /// Constants.
    rodata: __rodata_start .. __rodata_end;
    /// Data, zeroed data included.
    data: __data_start .. __data_end;
    /// Static pages for tables.
    pool: __pool_start .. __pool_end;
    /// Static memory for records.
    metadata: __metadata_start .. __metadata_end;
}

#[inline(never)]
fn span(start: usize, end: usize) -> Pages<Pfn> {
    let (start, end) = (start as u64, end as u64);
    Pages::from_raw(start / PAGE_SIZE, (end - start) / PAGE_SIZE)
        .unwrap_or_else(|| panic!("the linker script leaves an empty part at {start:#x}"))
}

/// The usable part of a stack.
pub fn stack(stack: &Stack) -> Pages<Pfn> {
    let start = stack.memory.get().addr();
    span(start, start + STACK_SIZE)
}

/// Zeroes the guest stacks of all CPUs, in memory too.
///
/// # Safety
///
/// No CPU has a guest, and none will have one.
pub unsafe fn forget_guests() {
    for page in STACKS.iter().skip(GUEST_STACKS).flat_map(|guests| stack(guests).iter()) {
        // SAFETY: EL2 maps its stacks one to one and writable; nobody uses these, as the caller says.
        unsafe { super::cache::wipe_page(page.base().as_u64()) };
    }
}

/// Whether an address lies in the guard page of some stack.
pub fn in_guard_page(address: u64) -> bool {
    STACKS.iter().any(|stack| {
        let start = stack.guard.get().addr() as u64;
        (start..start + GUARD_SIZE as u64).contains(&address)
    })
}
