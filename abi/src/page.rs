//! Page states, handles and pools as words in registers.

/// What the host may do with a page, as the hypervisor's tables say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum HostState {
    /// No access: the page is another's, or no memory at all.
    NoPage = 0,
    /// The host owns the page alone.
    Owned = 1,
    /// The host owns the page and lends it to the hypervisor or to a guest.
    SharedOwned = 2,
    /// A guest owns the page and shares it with the host.
    SharedBorrowed = 3,
}

impl HostState {
    /// Reads a state word.
    pub const fn from_word(word: u64) -> Option<Self> {
        match word {
            0 => Some(Self::NoPage),
            1 => Some(Self::Owned),
            2 => Some(Self::SharedOwned),
            3 => Some(Self::SharedBorrowed),
            _ => None,
        }
    }

    /// Whether a load or store of the host would succeed.
    pub const fn is_accessible(self) -> bool {
        !matches!(self, Self::NoPage)
    }
}

/// Guest pages, of one VM or several, that one page of the host can be lent to at a time.
pub const MAX_BORROWERS: u8 = 63;

/// Who owns a page. Every page of RAM has exactly one owner (invariant I1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum OwnerKind {
    /// The host.
    Host = 0,
    /// The hypervisor.
    Hyp = 1,
    /// A guest.
    Guest = 2,
}

/// Where pages go that the host gives to the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Pool {
    /// Tables of the host's stage-2 and of the hypervisor's own stage-1.
    Tables = 0,
    /// VM and vCPU records.
    Metadata = 1,
    /// Tables of one VM's stage-2; given with `VM_TOPUP`.
    Vm = 2,
}

impl Pool {
    /// Reads a pool word.
    pub const fn from_word(word: u64) -> Option<Self> {
        match word {
            0 => Some(Self::Tables),
            1 => Some(Self::Metadata),
            2 => Some(Self::Vm),
            _ => None,
        }
    }
}

/// Names one VM for ever (invariant I9): a slot and the slot's generation, which never repeats.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VmHandle(u32);

impl VmHandle {
    /// Slots that a handle can name.
    pub const SLOTS: usize = 256;
    /// Generations of a slot; generation 0 is never given out, so no handle is 0.
    pub const GENERATIONS: u32 = 1 << 24;

    /// Makes a handle; `None` if the generation is 0 or too large.
    pub const fn new(slot: u8, generation: u32) -> Option<Self> {
        if generation == 0 || generation >= Self::GENERATIONS {
            return None;
        }
        Some(Self(generation << 8 | slot as u32))
    }

    /// Reads a handle from a register; `None` if it cannot be one.
    pub const fn from_word(word: u64) -> Option<Self> {
        if word > u32::MAX as u64 {
            return None;
        }
        Self::new(word as u8, (word >> 8) as u32)
    }

    /// The register value.
    pub const fn to_word(self) -> u64 {
        self.0 as u64
    }

    /// Index into the table of VMs.
    pub const fn slot(self) -> u8 {
        self.0 as u8
    }

    /// Which use of the slot this is.
    pub const fn generation(self) -> u32 {
        self.0 >> 8
    }
}

impl core::fmt::Debug for VmHandle {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "vm{}.{}", self.slot(), self.generation())
    }
}

/// Properties of a VM, fixed at creation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmFlags {
    /// The VM's memory and registers are taken from the host. Otherwise the host lends its own pages and
    /// may read and write the VM's registers.
    pub protected: bool,
    /// `MEM_UNSHARE` revokes at once and tells nobody, as pKVM does; otherwise the host is asked first.
    pub unshare_immediate: bool,
    /// Every access to an address without memory is handed to the host with its data, as if the guest had
    /// enrolled it with `MMIO_GUARD`: for guests that know nothing of that call. See the threat model.
    pub mmio_unguarded: bool,
}

impl VmFlags {
    const PROTECTED: u64 = 1 << 0;
    const UNSHARE_IMMEDIATE: u64 = 1 << 1;
    const MMIO_UNGUARDED: u64 = 1 << 2;

    /// Reads a flag word; `None` if a bit is set that has no meaning.
    pub const fn from_word(word: u64) -> Option<Self> {
        if word & !(Self::PROTECTED | Self::UNSHARE_IMMEDIATE | Self::MMIO_UNGUARDED) != 0 {
            return None;
        }
        Some(Self {
            protected: word & Self::PROTECTED != 0,
            unshare_immediate: word & Self::UNSHARE_IMMEDIATE != 0,
            mmio_unguarded: word & Self::MMIO_UNGUARDED != 0,
        })
    }

    /// The register value.
    pub const fn to_word(self) -> u64 {
        (if self.protected { Self::PROTECTED } else { 0 })
            | (if self.unshare_immediate { Self::UNSHARE_IMMEDIATE } else { 0 })
            | (if self.mmio_unguarded { Self::MMIO_UNGUARDED } else { 0 })
    }
}

/// What a guest may do with a page that the host lends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// Stores are allowed. Loads always are.
    pub write: bool,
    /// Instruction fetches are allowed.
    pub execute: bool,
}

impl Permissions {
    /// Everything is allowed.
    pub const ALL: Self = Self { write: true, execute: true };

    /// Reads a permission word: bit 0 write, bit 1 execute; `None` for any other bit.
    pub const fn from_word(word: u64) -> Option<Self> {
        if word & !3 != 0 {
            return None;
        }
        Some(Self { write: word & 1 != 0, execute: word & 2 != 0 })
    }

    /// The register value.
    pub const fn to_word(self) -> u64 {
        self.write as u64 | (self.execute as u64) << 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_survives_its_word_and_absurd_words_are_none() {
        let handle = VmHandle::new(7, 3).unwrap();
        assert_eq!(VmHandle::from_word(handle.to_word()), Some(handle));
        for word in [0, 0xff, 1 << 32, u64::MAX] {
            assert_eq!(VmHandle::from_word(word), None, "{word:#x}");
        }
        assert_eq!(VmHandle::new(0, VmHandle::GENERATIONS), None);
    }

    #[test]
    fn flags_with_an_unknown_bit_are_refused() {
        for word in 0..8 {
            assert_eq!(VmFlags::from_word(word).unwrap().to_word(), word);
        }
        assert_eq!(VmFlags::from_word(8), None);
        assert_eq!(Permissions::from_word(4), None);
    }
}
