//! Heap, arguments, printing, and the end of the program.

use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::arch;
use crate::steps::{Steps, format};
use crate::sys;
use crate::uapi::nr;

/// Bytes of the heap: a program allocates little and ends soon, so nothing is ever given back but the
/// block that was taken last. Its pages come when they are first used.
const HEAP_SIZE: usize = 8 << 20;

#[repr(align(16))]
struct Heap {
    bytes: UnsafeCell<[u8; HEAP_SIZE]>,
    used: AtomicUsize,
}

// SAFETY: the bytes are reached only through blocks that `alloc` has handed out, each to one owner.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap { bytes: UnsafeCell::new([0; HEAP_SIZE]), used: AtomicUsize::new(0) };

// SAFETY: `alloc` hands out disjoint blocks of the array with the alignment asked for (at most that of the
// array, else null); `dealloc` takes back only the block that ends where the free part begins.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let start = |used: usize| used.next_multiple_of(layout.align());
        let taken = self.used.fetch_update(Ordering::Acquire, Ordering::Acquire, |used| {
            start(used).checked_add(layout.size()).filter(|end| *end <= HEAP_SIZE && layout.align() <= 16)
        });
        match taken {
            Ok(used) => self.bytes.get().cast::<u8>().wrapping_add(start(used)),
            Err(_) => core::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let start = block as usize - self.bytes.get() as usize;
        // Otherwise it is not the last one, and stays.
        let _ =
            // What was stored there comes before what the next owner stores.
            self.used.compare_exchange(start + layout.size(), start, Ordering::Release, Ordering::Relaxed);
    }
}

unsafe extern "Rust" {
    safe fn deed_program_main(arguments: &[&str], steps: &mut Steps) -> Result<(), crate::Failure>;
}

/// Entry of the Rust part; `stack` is what the kernel left there: argc, argv, ...
// SAFETY: called by start.S alone, with this signature.
#[unsafe(no_mangle)]
extern "C" fn deed_program_start(stack: *const u64) -> ! {
    let arguments = arguments(stack);
    let mut steps = Steps::new(print);
    sys::install_signal_handlers();
    if let Err(failure) = deed_program_main(&arguments, &mut steps) {
        steps.check("program-runs-to-its-end", "yes", failure, false);
    }
    let failed = steps.finish();
    exit(failed.min(100) as u64)
}

fn arguments(stack: *const u64) -> Vec<&'static str> {
    // SAFETY: the kernel puts argc at the top of the stack.
    let count = unsafe { stack.read() };
    (1..=count as usize)
        .filter_map(|index| {
            // SAFETY: argc pointers follow argc.
            let argument = unsafe { stack.wrapping_add(index).read() };
            // SAFETY: each points to a string that ends with a zero byte and stays for the program's life.
            let text = unsafe { CStr::from_ptr(argument as *const _) };
            text.to_str().ok()
        })
        .collect()
}

/// Prints with one system call.
pub fn print(text: &str) {
    // SAFETY: the kernel reads the text and nothing else.
    unsafe { arch::syscall(nr::WRITE, [1, text.as_ptr() as u64, text.len() as u64, 0, 0, 0]) };
}

/// Ends the program.
pub fn exit(code: u64) -> ! {
    loop {
        // SAFETY: the call does not return.
        unsafe { arch::syscall(nr::EXIT_GROUP, [code, 0, 0, 0, 0, 0]) };
    }
}

/// A signal outside any probe ends the program.
// SAFETY: called by start.S alone, on the signal's stack frame, with this signature.
#[unsafe(no_mangle)]
extern "C" fn deed_signal_unexpected(signal: u64, info: *const u64) -> ! {
    // SAFETY: the kernel passes a siginfo, whose third word is the address.
    let address = unsafe { info.wrapping_add(2).read() };
    print(&format(format_args!("The program dies of signal {signal} at {address:#x}.\n")));
    exit(128 + signal)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let mut steps = Steps::new(print);
    steps.check("program-runs-to-its-end", "yes", info, false);
    exit(101)
}
