//! Bare-metal EL1 guests for Deed: what they have in common.
//!
//! | module | what it holds |
//! |---|---|
//! | [`protocol`] | the device registers, commands and numbers that a guest and its VMM agree on |
//! | `arch` | entry, stage-1 tables, exception vectors, single instructions: the unsafe part |
//! | `call` | the guest's calls: KVM's vendor calls and PSCI |
//! | `device` | the guest's one device, for talking to the VMM |
//!
//! A guest is a raw binary at the start of guest RAM. It is entered at its first byte at EL1 with the MMU
//! off and x0 = an argument of the VMM's, turns its MMU on with tables that the linker has filled in, and
//! calls the function named by [`guest!`]. When that function returns, the guest powers itself off.
//!
//! All but `protocol` exists on the bare-metal target with the feature `image` only; the VMM's side uses
//! `protocol` alone.

#![no_std]

pub mod protocol;

#[cfg(all(target_os = "none", feature = "image"))]
pub mod arch;
#[cfg(all(target_os = "none", feature = "image"))]
pub mod call;
#[cfg(all(target_os = "none", feature = "image"))]
pub mod device;

/// Names the guest's main function, `fn(argument: u64)`, and makes the binary an empty program where the
/// target has an operating system.
#[macro_export]
macro_rules! guest {
    ($main:path) => {
        #[cfg(target_os = "none")]
        mod deed_guest_entry {
            $crate::guest_entry!();
        }

        #[cfg(target_os = "none")]
        const _: () = {
            #[panic_handler]
            fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
                $crate::arch::report_panic(info)
            }

            /// Called once by the entry code, on the boot vCPU.
            // SAFETY: the entry code in this package's library is the only user of the symbol, and it
            // declares the same signature.
            #[unsafe(no_mangle)]
            extern "C" fn deed_guest_main(argument: u64) {
                let main: fn(u64) = $main;
                main(argument);
            }
        };
    };
}
