//! A guest's access to a device: what the syndrome says of it, and its completion.
//!
//! EL2 keeps the access and completes it itself: the host gives a number, and size, sign and register are
//! EL2's (invariant I8). An access without a valid syndrome, or across the end of a page, cannot be shown
//! to the host and is an external abort to the guest.

use crate::addr::{Ipa, PAGE_SIZE};
use crate::vm::context::Context;

/// Fields of ESR_EL2.ISS for a data abort from a lower level (Arm ARM, ESR_EL2).
mod iss {
    pub(super) const ISV: u64 = 1 << 24;
    pub(super) const SAS_SHIFT: u32 = 22;
    pub(super) const SSE: u64 = 1 << 21;
    pub(super) const SRT_SHIFT: u32 = 16;
    pub(super) const SF: u64 = 1 << 15;
    pub(super) const CM: u64 = 1 << 8;
    pub(super) const S1PTW: u64 = 1 << 7;
    pub(super) const WNR: u64 = 1 << 6;
}

/// One load or store of a general register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Where.
    pub ipa: Ipa,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// A store.
    pub write: bool,
    register: u8,
    sign_extend: bool,
    sixty_four: bool,
}

impl Access {
    /// Reads the access from the syndrome of a data abort; `None` if it says too little or if the access
    /// leaves its page.
    pub fn decode(esr: u64, ipa: Ipa) -> Option<Self> {
        if esr & iss::ISV == 0 || esr & (iss::CM | iss::S1PTW) != 0 {
            return None;
        }
        let size = 1u8 << (esr >> iss::SAS_SHIFT & 0b11);
        if ipa.page_offset().saturating_add(u64::from(size)) > PAGE_SIZE {
            return None;
        }
        Some(Self {
            ipa,
            size,
            write: esr & iss::WNR != 0,
            register: (esr >> iss::SRT_SHIFT & 0x1f) as u8,
            sign_extend: esr & iss::SSE != 0,
            sixty_four: esr & iss::SF != 0,
        })
    }

    /// The value that a store writes, cut to its size; 0 for a load.
    pub fn value(&self, context: &Context) -> u64 {
        if self.write { context.x(self.register) & self.mask() } else { 0 }
    }

    /// Ends the access: gives a load its value, cut to its size and extended as the instruction says, and
    /// steps over the instruction.
    pub fn complete(&self, context: &mut Context, value: u64) {
        if !self.write {
            let mut value = value & self.mask();
            let sign = self.mask() ^ (self.mask() >> 1);
            if self.sign_extend && value & sign != 0 {
                value |= !self.mask();
            }
            if !self.sixty_four {
                value &= u64::from(u32::MAX);
            }
            context.set_x(self.register, value);
        }
        context.skip_instruction();
    }

    const fn mask(&self) -> u64 {
        match self.size {
            1 => u8::MAX as u64,
            2 => u16::MAX as u64,
            4 => u32::MAX as u64,
            _ => u64::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn esr(size_log2: u64, register: u64, flags: u64) -> u64 {
        iss::ISV | size_log2 << iss::SAS_SHIFT | register << iss::SRT_SHIFT | flags
    }

    fn at(address: u64) -> Ipa {
        Ipa::new(address).unwrap()
    }

    fn load(size_log2: u64, flags: u64, value: u64) -> u64 {
        let mut context = Context::default();
        context.set_x(3, u64::MAX);
        Access::decode(esr(size_log2, 3, flags), at(0x900_0000)).unwrap().complete(&mut context, value);
        assert_eq!(context.pc, 4);
        context.x(3)
    }

    #[test]
    fn a_loaded_value_is_cut_to_the_size_of_the_access() {
        assert_eq!(load(0, 0, 0x1234_5678_9abc_def0), 0xf0);
        assert_eq!(load(1, 0, 0x1234_5678_9abc_def0), 0xdef0);
        assert_eq!(load(2, 0, 0x1234_5678_9abc_def0), 0x9abc_def0);
        assert_eq!(load(3, iss::SF, 0x1234_5678_9abc_def0), 0x1234_5678_9abc_def0);
    }

    #[test]
    fn a_signed_load_extends_to_its_register_and_no_further() {
        assert_eq!(load(0, iss::SSE, 0x80), 0xffff_ff80);
        assert_eq!(load(0, iss::SSE | iss::SF, 0x80), 0xffff_ffff_ffff_ff80);
        assert_eq!(load(1, iss::SSE | iss::SF, 0x7fff), 0x7fff);
        assert_eq!(load(2, iss::SSE | iss::SF, 0x8000_0000), 0xffff_ffff_8000_0000);
    }

    #[test]
    fn a_store_shows_its_bytes_only() {
        let mut context = Context::default();
        context.set_x(3, 0x1234_5678_9abc_def0);
        let store = Access::decode(esr(0, 3, iss::WNR), at(0x900_0001)).unwrap();
        assert_eq!((store.write, store.size, store.value(&context)), (true, 1, 0xf0));
        store.complete(&mut context, 77);
        assert_eq!((context.x(3), context.pc), (0x1234_5678_9abc_def0, 4));
        let zero = Access::decode(esr(3, 31, iss::WNR), at(0x900_0000)).unwrap();
        assert_eq!(zero.value(&context), 0);
    }

    #[test]
    fn an_access_without_syndrome_or_across_a_page_is_none() {
        assert_eq!(Access::decode(0, at(0x900_0000)), None);
        for flag in [iss::CM, iss::S1PTW] {
            assert_eq!(Access::decode(esr(2, 0, flag), at(0x900_0000)), None);
        }
        assert_eq!(Access::decode(esr(2, 0, 0), at(0x900_0ffd)), None);
        assert!(Access::decode(esr(2, 0, 0), at(0x900_0ffc)).is_some());
    }
}
