//! Why a vCPU stopped: what `VCPU_RUN` returns to the host, from x2 on.
//!
//! An exit of a protected VM carries what the host needs to go on and nothing else (invariant I10).

/// What a guest's access to a page was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Access {
    /// A load.
    Read = 0,
    /// A store.
    Write = 1,
    /// An instruction fetch.
    Execute = 2,
}

/// Why a VM is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Fatal {
    /// The guest entered AArch32 state.
    AArch32 = 0,
    /// The guest raised an exception that Deed neither serves nor reflects.
    Unexpected = 1,
}

/// Why the vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An interrupt for the host is pending: take it, then run the vCPU again.
    Interrupted,
    /// The guest waits for an interrupt (`WFI`) or an event (`WFE`, `event`).
    Wait {
        /// It was `WFE`.
        event: bool,
    },
    /// The guest touched, or asked to share, a page that is not there. Donate it and run again.
    MissingPage {
        /// Address of the page.
        ipa: u64,
        /// Kind of access.
        access: Access,
    },
    /// The guest accessed a page that it enrolled as a device; or, without a guard (see
    /// [`VmFlags`](crate::VmFlags)) or protection, an address without memory. For a load, give the value with
    /// the next run. If there is memory by then, the guest's instruction runs again instead.
    Mmio {
        /// Address of the access.
        ipa: u64,
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
        /// A store; otherwise a load.
        write: bool,
        /// The stored value, zero for a load.
        value: u64,
    },
    /// The guest wants these shared pages back: unmap them everywhere, then `UNSHARE_ACK`.
    Unshare {
        /// Address of the first page.
        ipa: u64,
        /// Number of pages.
        pages: u64,
    },
    /// A guest's call lacks table pages: give them and run again.
    NeedPages {
        /// To which pool.
        pool: crate::page::Pool,
        /// How many.
        pages: u64,
    },
    /// A call that the host serves. Give x0 to x3 with the next run.
    GuestCall {
        /// The guest's x0 to x6.
        arguments: [u64; 7],
    },
    /// The guest turned itself off for good.
    SystemOff,
    /// The guest asked for a reset; for this VM it is the end too.
    SystemReset,
    /// The guest turned another vCPU on: run it.
    CpuOn {
        /// Its index.
        vcpu: u64,
    },
    /// The guest turned this vCPU off.
    CpuOff,
    /// An SError arrived while the guest ran; it is pending for the host now.
    SError,
    /// The VM is dead.
    Fatal(Fatal),
}

/// Registers that an exit takes: x2 (the reason) to x9.
pub const EXIT_WORDS: usize = 8;

impl Exit {
    /// The values of x2 to x9.
    #[inline]
    pub fn to_words(self) -> [u64; EXIT_WORDS] {
        let mut words = [0; EXIT_WORDS];
        self.write(&mut words);
        words
    }

    /// Writes those words that the exit says something with, and leaves the others alone.
    #[inline]
    pub fn write(&self, words: &mut [u64; EXIT_WORDS]) {
        let [first, others @ ..] = words;
        let mut say = |reason, data: &[u64]| {
            *first = reason;
            for (word, value) in others.iter_mut().zip(data) {
                *word = *value;
            }
        };
        match self {
            Self::Interrupted => say(0, &[]),
            Self::Wait { event } => say(1, &[*event as u64]),
            Self::MissingPage { ipa, access } => say(2, &[*ipa, *access as u64]),
            Self::Mmio { ipa, size, write, value } => say(3, &[*ipa, *size as u64, *write as u64, *value]),
            Self::Unshare { ipa, pages } => say(4, &[*ipa, *pages]),
            Self::NeedPages { pool, pages } => say(5, &[*pool as u64, *pages]),
            Self::GuestCall { arguments } => say(6, arguments),
            Self::SystemOff => say(7, &[]),
            Self::SystemReset => say(8, &[]),
            Self::CpuOn { vcpu } => say(9, &[*vcpu]),
            Self::CpuOff => say(10, &[]),
            Self::SError => say(11, &[]),
            Self::Fatal(why) => say(12, &[*why as u64]),
        }
    }

    /// Reads x2 to x9; `None` if they are no exit.
    pub fn from_words(words: [u64; EXIT_WORDS]) -> Option<Self> {
        let [reason, a, b, c, d, e, f, g] = words;
        Some(match reason {
            0 => Self::Interrupted,
            1 => Self::Wait { event: a != 0 },
            2 => Self::MissingPage {
                ipa: a,
                access: match b {
                    0 => Access::Read,
                    1 => Access::Write,
                    2 => Access::Execute,
                    _ => return None,
                },
            },
            3 => Self::Mmio { ipa: a, size: u8::try_from(b).ok()?, write: c != 0, value: d },
            4 => Self::Unshare { ipa: a, pages: b },
            5 => Self::NeedPages { pool: crate::page::Pool::from_word(a)?, pages: b },
            6 => Self::GuestCall { arguments: [a, b, c, d, e, f, g] },
            7 => Self::SystemOff,
            8 => Self::SystemReset,
            9 => Self::CpuOn { vcpu: a },
            10 => Self::CpuOff,
            11 => Self::SError,
            12 => Self::Fatal(match a {
                0 => Fatal::AArch32,
                1 => Fatal::Unexpected,
                _ => return None,
            }),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_survives_its_words() {
        let exits = [
            Exit::Interrupted,
            Exit::Wait { event: true },
            Exit::MissingPage { ipa: 0x8000_0000, access: Access::Execute },
            Exit::Mmio { ipa: 0x900_0000, size: 4, write: true, value: 0x55 },
            Exit::Unshare { ipa: 0x8000_1000, pages: 3 },
            Exit::NeedPages { pool: crate::page::Pool::Vm, pages: 2 },
            Exit::GuestCall { arguments: [1, 2, 3, 4, 5, 6, 7] },
            Exit::SystemOff,
            Exit::SystemReset,
            Exit::CpuOn { vcpu: 1 },
            Exit::CpuOff,
            Exit::SError,
            Exit::Fatal(Fatal::Unexpected),
        ];
        for exit in exits {
            assert_eq!(Exit::from_words(exit.to_words()), Some(exit));
        }
        assert_eq!(Exit::from_words([99, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
