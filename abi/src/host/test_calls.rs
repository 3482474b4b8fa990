//! Words of the calls that only test builds serve.

/// How the hypervisor breaks in [`HostCall::TestFail`](super::HostCall::TestFail).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FailureKind {
    /// It finds an invariant broken.
    Invariant = 0,
    /// It loads from a page at its physical address, where EL2 maps only what is its own.
    Access = 1,
    /// It calls itself without end.
    Stack = 2,
}

impl FailureKind {
    /// Reads the word.
    pub const fn from_word(word: u64) -> Option<Self> {
        Some(match word {
            0 => Self::Invariant,
            1 => Self::Access,
            2 => Self::Stack,
            _ => return None,
        })
    }
}

/// What a page-table event of [`HostCall::TestEvents`](super::HostCall::TestEvents) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// A word of a table, or of a page that is about to be one, was changed.
    Write = 1,
    /// Translations of pages under a VMID were dropped.
    DropStage2 = 2,
    /// All translations under a VMID were dropped, for the last time.
    Retire = 3,
    /// Translations of EL2's own were dropped.
    DropHyp = 4,
    /// A page was wiped.
    Wipe = 5,
}

impl EventKind {
    /// Reads the word; `None` for 0, which is no event, and for what is no kind.
    pub const fn from_word(word: u64) -> Option<Self> {
        Some(match word {
            1 => Self::Write,
            2 => Self::DropStage2,
            3 => Self::Retire,
            4 => Self::DropHyp,
            5 => Self::Wipe,
            _ => return None,
        })
    }
}
