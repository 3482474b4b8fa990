//! The EL0 programs of Deed's host: what they have in common.
//!
//! | module | what it holds |
//! |---|---|
//! | [`steps`] | the report: prose for people, one line per checked step for machines |
//! | [`device`] | the device that a guest of `guest-stub` talks to |
//! | [`uapi`] | numbers and structures of Linux, KVM and `/dev/deed` |
//! | [`census`] | counts of pages by owner, and what must be equal between two of them |
//! | `arch` | entry, system calls, accesses that survive a signal: the unsafe part |
//! | `runtime` | heap, arguments, printing, the end of the program |
//! | `sys` | files and mappings |
//! | `kvm` | VMs and vCPUs by KVM's interface |
//! | `deed` | the research device: a program that acts as the host's kernel |
//! | `series` | calls, loads and stores that the kernel makes one after the other |
//! | `cpu` | another CPU of the host's, which plays a series |
//! | `player` | a guest that does what it is told, on two vCPUs |
//! | `play` | lists of calls that the kernel plays and counts |
//! | `machine` | a VM with memory, a guest's image and its device |
//! | `raw_vm` | a VM made by host calls alone, behind the kernel's back |
//! | `thread` | threads of a program, and how they wait for each other |
//! | `hostile` | what a host must not do, and what it is told |
//!
//! The first four modules are plain code and build everywhere; the others exist on the target only.

#![no_std]

extern crate alloc;

pub mod census;
pub mod device;
pub mod events;
pub mod steps;
pub mod uapi;

#[cfg(target_os = "none")]
pub mod arch;
#[cfg(target_os = "none")]
pub mod cpu;
#[cfg(target_os = "none")]
pub mod deed;
#[cfg(target_os = "none")]
pub mod hostile;
#[cfg(target_os = "none")]
pub mod kvm;
#[cfg(target_os = "none")]
pub mod machine;
#[cfg(target_os = "none")]
pub mod play;
#[cfg(target_os = "none")]
pub mod player;
#[cfg(target_os = "none")]
pub mod raw_vm;
#[cfg(target_os = "none")]
pub mod runtime;
#[cfg(target_os = "none")]
pub mod series;
#[cfg(target_os = "none")]
pub mod sys;
#[cfg(target_os = "none")]
pub mod thread;

/// Why a program cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A system call failed.
    System {
        /// What was tried.
        what: &'static str,
        /// Linux's error number.
        errno: i32,
    },
    /// Something else.
    Other(alloc::string::String),
}

impl core::fmt::Display for Failure {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::System { what, errno } => write!(f, "{what}: errno {errno}"),
            Self::Other(why) => f.write_str(why),
        }
    }
}

impl core::error::Error for Failure {}

/// Makes a [`Failure::Other`] from a format string.
#[macro_export]
macro_rules! failure {
    ($($arguments:tt)*) => {
        $crate::Failure::Other($crate::steps::format(format_args!($($arguments)*)))
    };
}

/// Names the program's main function, `fn(&[&str], &mut Steps) -> Result<(), Failure>`, and makes the binary
/// an empty program where the target has an operating system.
#[macro_export]
macro_rules! program {
    ($main:path) => {
        #[cfg(target_os = "none")]
        const _: () = {
            /// Called once by the runtime.
            // SAFETY: the runtime in this package's library is the only user of the symbol, and it declares
            // the same signature.
            #[unsafe(no_mangle)]
            fn deed_program_main(
                arguments: &[&str],
                steps: &mut $crate::steps::Steps,
            ) -> Result<(), $crate::Failure> {
                $main(arguments, steps)
            }
        };
    };
}
