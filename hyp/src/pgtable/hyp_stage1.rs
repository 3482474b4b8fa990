//! Leaves of EL2's own stage-1: what the hypervisor can reach.
//!
//! EL2 maps only what it owns or has pinned, at the page's own address, plus the console. Nothing is both
//! writable and executable.

use super::{Regime, TABLE_OR_PAGE, VALID, output};
use crate::addr::{PAGE_SIZE, Pages, Pfn, Vpn};
use crate::machine::Machine;

/// Width of EL2's addresses: TCR_EL2.T0SZ = 16.
pub const VA_BITS: u32 = 48;
/// Index in MAIR_EL2 of normal write-back memory; the byte there is 0xff.
pub const MAIR_NORMAL: u64 = 0;
/// Index in MAIR_EL2 of Device-nGnRE; the byte there is 0x04.
pub const MAIR_DEVICE: u64 = 1;

const ATTRIBUTES_SHIFT: u32 = 2;
/// AP\[1\], which is RES1 in a regime of one privilege level (DDI 0487, D8.4).
const ACCESS_RES1: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESSED: u64 = 1 << 10;
const EXECUTE_NEVER: u64 = 1 << 54;

/// What EL2 may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Code.
    ReadExecute,
    /// Constants.
    ReadOnly,
    /// Data.
    ReadWrite,
    /// Registers of a device.
    Device,
}

/// A page that EL2 can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The physical page.
    pub pfn: Pfn,
    /// What EL2 may do with it.
    pub rights: Rights,
}

/// EL2's stage-1 regime.
#[derive(Clone, Copy, Debug)]
pub struct HypStage1;

impl Regime for HypStage1 {
    type Input = Vpn;
    type Entry = Option<Mapped>;

    const EMPTY: Option<Mapped> = None;
    // Another CPU's EL2 may be reading a table in the very block that is split.
    const BREAKS: bool = false;
    const SOFTWARE: u64 = 0;

    const LOCKED: u64 = 0;

    #[inline(always)]
    fn encode(&self, entry: Option<Mapped>) -> u64 {
        let Some(Mapped { pfn, rights }) = entry else { return 0 };
        let attributes = match rights {
            Rights::ReadExecute => MAIR_NORMAL << ATTRIBUTES_SHIFT | READ_ONLY,
            Rights::ReadOnly => MAIR_NORMAL << ATTRIBUTES_SHIFT | READ_ONLY | EXECUTE_NEVER,
            Rights::ReadWrite => MAIR_NORMAL << ATTRIBUTES_SHIFT | EXECUTE_NEVER,
            Rights::Device => MAIR_DEVICE << ATTRIBUTES_SHIFT | EXECUTE_NEVER,
        };
        pfn.base().as_u64() | VALID | TABLE_OR_PAGE | attributes | ACCESS_RES1 | INNER_SHAREABLE | ACCESSED
    }

    #[inline]
    fn decode(word: u64) -> Option<Mapped> {
        if word & (VALID | TABLE_OR_PAGE) != VALID | TABLE_OR_PAGE {
            return None;
        }
        let device = word >> ATTRIBUTES_SHIFT & 0b111 == MAIR_DEVICE;
        let rights = match (device, word & EXECUTE_NEVER != 0, word & READ_ONLY != 0) {
            (true, _, _) => Rights::Device,
            (false, false, _) => Rights::ReadExecute,
            (false, true, true) => Rights::ReadOnly,
            (false, true, false) => Rights::ReadWrite,
        };
        Some(Mapped { pfn: output(word), rights })
    }

    #[inline(always)]
    fn step(word: u64) -> u64 {
        if word & VALID != 0 { PAGE_SIZE } else { 0 }
    }

    fn invalidate<M: Machine>(&self, machine: &M, _root: Pfn, pages: Pages<Vpn>) {
        machine.invalidate_hyp(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mapping_survives_its_descriptor() {
        let pfn = Pfn::new(0x40200).unwrap();
        for rights in [Rights::ReadExecute, Rights::ReadOnly, Rights::ReadWrite, Rights::Device] {
            let entry = Some(Mapped { pfn, rights });
            assert_eq!(HypStage1::decode(HypStage1.encode(entry)), entry);
        }
        assert_eq!(HypStage1::decode(0), None);
    }

    /// Fields of a leaf of EL2's stage 1, written out from the Arm ARM, D8.3.1.2 and D8.5: AttrIndx at 2, AP at 6 (AP[1]
    /// is RES1), SH at 8, AF at 10, XN at 54.
    #[test]
    fn a_leaf_says_to_hardware_what_memory_it_is() {
        let leaf = |rights| HypStage1.encode(Some(Mapped { pfn: Pfn::new(0x4_0005).unwrap(), rights }));
        let words = [Rights::ReadExecute, Rights::ReadOnly, Rights::ReadWrite, Rights::Device].map(leaf);
        let never = 1 << 54;
        assert_eq!(words, [0x4000_57c3, never | 0x4000_57c3, never | 0x4000_5743, never | 0x4000_5747]);
    }

    #[test]
    fn nothing_is_writable_and_executable() {
        let pfn = Pfn::new(1).unwrap();
        for rights in [Rights::ReadExecute, Rights::ReadOnly, Rights::ReadWrite, Rights::Device] {
            let word = HypStage1.encode(Some(Mapped { pfn, rights }));
            assert!(word & READ_ONLY != 0 || word & EXECUTE_NEVER != 0, "{rights:?}");
        }
    }
}
