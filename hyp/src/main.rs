//! The EL2 image. Everything is in the library: execution begins in `arch/boot.S`.

#![no_std]
#![no_main]

use core::panic::PanicInfo;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    hyp::arch::panic::on_panic(info)
}
