//! The calls of a guest: which one it is, and whether its arguments can be right.
//!
//! Decoding is pure; [`super::run`] serves what it yields. All that a guest must trust is answered by EL2.
//! A closed list is handed to the host, which sees x0 to x6 of such a call and gives x0 to x3. Everything
//! else is NOT_SUPPORTED (docs/hypercalls.md, Guest calls). Numbers and argument rules: [`abi::guest`].

use crate::addr::{Gfn, Ipa, PAGE_SIZE, Pages};
use abi::smccc::{FunctionId, INVALID_PARAMETER, NOT_SUPPORTED, SUCCESS};
use abi::{guest, smccc};

/// x0 to x3 of an answer.
pub type Answer = [u64; 4];

/// An answer with x1 to x3 zero.
pub const fn answer(x0: u64) -> Answer {
    [x0, 0, 0, 0]
}

/// What a guest asks for its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The host may access the pages.
    Share,
    /// The pages are private again.
    Unshare,
    /// The host gets the pages back, wiped.
    Relinquish,
    /// The pages are a device of the host's.
    GuardMap,
    /// They are not any more.
    GuardUnmap,
}

/// A guest's call, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestCall {
    /// The answer is known.
    Answer(Answer),
    /// A call about its own memory.
    Memory(Request, Pages<Gfn>),
    /// From now on only pages given to `GuardMap` are devices.
    Enroll,
    /// Power state coordination.
    Psci {
        /// Function id.
        function: u32,
        /// x1 to x3.
        arguments: [u64; 3],
    },
    /// The host serves it.
    Forward,
}

/// KVM_FUNC_HAS_RANGE: `MEM_SHARE` and `MEM_UNSHARE` take a number of pages (Android's extension of
/// `HYP_MEMINFO`).
const HAS_RANGE: u64 = 1;

/// Functions of a VM that is not protected: only the list itself. Its memory is the host's anyway.
const UNPROTECTED_FEATURES: u64 = 1 << 0;

impl GuestCall {
    /// Decodes x0 to x3 of a guest's HVC.
    #[inline]
    pub fn decode(registers: [u64; 4], protected: bool) -> Self {
        let [x0, x1, x2, x3] = registers;
        let function = FunctionId::from_x0(x0).number();
        match function & OWNER {
            VENDOR => Self::vendor(function, [x1, x2, x3], protected),
            STANDARD if function & NUMBER <= LAST_PSCI => Self::Psci { function, arguments: [x1, x2, x3] },
            _ => match function {
                smccc::VERSION => Self::Answer(answer(smccc::VERSION_1_1)),
                smccc::ARCH_FEATURES => Self::Answer(answer(arch_feature(x1 as u32))),
                _ => Self::Answer(answer(NOT_SUPPORTED)),
            },
        }
    }

    /// The calls of the vendor-specific hypervisor range.
    #[inline]
    fn vendor(function: u32, arguments: [u64; 3], protected: bool) -> Self {
        let memory = |request| match range(arguments) {
            Some(pages) => Self::Memory(request, pages),
            None => Self::Answer(answer(INVALID_PARAMETER)),
        };
        let granule = |x1_out| match arguments {
            [0, 0, 0] => Self::Answer([PAGE_SIZE, x1_out, 0, 0]),
            _ => Self::Answer(answer(INVALID_PARAMETER)),
        };
        match function {
            guest::FEATURES if protected => Self::Answer(answer(guest::PROTECTED_FEATURES)),
            guest::FEATURES => Self::Answer(answer(UNPROTECTED_FEATURES)),
            guest::PTP => Self::Forward,
            smccc::VENDOR_HYP_UID => Self::Answer(guest::KVM_UID.map(u64::from)),
            _ if !protected => Self::Answer(answer(NOT_SUPPORTED)),
            guest::HYP_MEMINFO => granule(HAS_RANGE),
            guest::MEM_SHARE => memory(Request::Share),
            guest::MEM_UNSHARE => memory(Request::Unshare),
            guest::MEM_RELINQUISH => memory(Request::Relinquish),
            guest::MMIO_GUARD_INFO => granule(0),
            guest::MMIO_GUARD_ENROLL => Self::Enroll,
            guest::MMIO_GUARD_MAP => memory(Request::GuardMap),
            guest::MMIO_GUARD_UNMAP => memory(Request::GuardUnmap),
            _ => Self::Answer(answer(NOT_SUPPORTED)),
        }
    }
}

/// The bits of a function id that say whose it is: fast call and owner, whatever the width of its registers.
const OWNER: u32 = 0xbf00_0000;
/// Those that number the owner's functions.
const NUMBER: u32 = 0xffff;
/// The vendor-specific hypervisor range.
const VENDOR: u32 = 0x8600_0000;
/// The standard secure service range, in which PSCI has the numbers up to [`LAST_PSCI`].
const STANDARD: u32 = 0x8400_0000;
const LAST_PSCI: u32 = 0x1f;

/// Pages that one call does at most, counted from the first page of the range: up to the end of the
/// last-level table that it lies in. So a call changes all its pages or none.
pub fn first_chunk(pages: Pages<Gfn>) -> Pages<Gfn> {
    pages.truncated(crate::pgtable::rest_of_region(pages.start().as_u64()))
}

/// The pages that a memory call names: x1 is a page-aligned IPA, x2 a number with 0 for 1, x3 zero.
#[inline]
fn range([ipa, count, zero]: [u64; 3]) -> Option<Pages<Gfn>> {
    let ipa = Ipa::new(ipa).filter(|ipa| ipa.is_page_aligned())?;
    Pages::new(Gfn::containing(ipa), count.max(1)).filter(|_| zero == 0)
}

/// `SMCCC_ARCH_FEATURES`: the workaround calls are not offered. Deed's threat model leaves side channels
/// out, and says so; a guest applies the workarounds that it can apply by itself.
fn arch_feature(function: u32) -> u64 {
    match function {
        smccc::VERSION | smccc::ARCH_FEATURES => SUCCESS,
        _ => NOT_SUPPORTED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(x0: u32, arguments: [u64; 3]) -> GuestCall {
        let [x1, x2, x3] = arguments;
        GuestCall::decode([u64::from(x0), x1, x2, x3], true)
    }

    fn refused() -> GuestCall {
        GuestCall::Answer(answer(INVALID_PARAMETER))
    }

    fn unknown() -> GuestCall {
        GuestCall::Answer(answer(NOT_SUPPORTED))
    }

    #[test]
    fn discovery_names_kvm_and_the_calls_that_are_served() {
        assert_eq!(
            decode(smccc::VENDOR_HYP_UID, [0; 3]),
            GuestCall::Answer([0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d])
        );
        let GuestCall::Answer([features, 0, 0, 0]) = decode(guest::FEATURES, [0; 3]) else { panic!() };
        for bit in 0..32 {
            let served = [0x8600_0000, 0xc600_0000]
                .iter()
                .any(|base| !matches!(decode(base + bit, [0; 3]), call if call == unknown()));
            // Upstream does not report the clock of the host to a protected guest either.
            assert_eq!(features >> bit & 1 != 0 || bit == 1, served, "function {bit}");
        }
    }

    #[test]
    fn meminfo_with_an_argument_is_refused() {
        assert_eq!(decode(guest::HYP_MEMINFO, [0; 3]), GuestCall::Answer([4096, 1, 0, 0]));
        for arguments in [[1, 0, 0], [0, 1, 0], [0, 0, 1]] {
            assert_eq!(decode(guest::HYP_MEMINFO, arguments), refused());
        }
    }

    #[test]
    fn a_range_without_a_count_is_one_page() {
        let one = Pages::from_raw(0x80000, 1).unwrap();
        for count in [0, 1] {
            let call = decode(guest::MEM_SHARE, [0x8000_0000, count, 0]);
            assert_eq!(call, GuestCall::Memory(Request::Share, one));
        }
    }

    #[test]
    fn absurd_ranges_are_refused() {
        for arguments in [
            [0x8000_0001, 1, 0],
            [0x8000_0800, 1, 0],
            [0x8000_0000, 1, 1],
            [0x8000_0000, u64::MAX, 0],
            [0x8000_0000, 1 << 52, 0],
            [1 << 48, 1, 0],
            [!0xfff, 1, 0],
        ] {
            for function in
                [guest::MEM_SHARE, guest::MEM_UNSHARE, guest::MEM_RELINQUISH, guest::MMIO_GUARD_MAP]
            {
                assert_eq!(decode(function, arguments), refused(), "{arguments:x?}");
            }
        }
    }

    #[test]
    fn a_guest_that_is_not_protected_has_no_memory_calls() {
        for function in guest::HYP_MEMINFO..=guest::MEM_RELINQUISH {
            let call = GuestCall::decode([u64::from(function), 0x8000_0000, 1, 0], false);
            assert_eq!(call, unknown(), "{function:#x}");
        }
        let features = GuestCall::decode([u64::from(guest::FEATURES), 0, 0, 0], false);
        assert_eq!(features, GuestCall::Answer(answer(1)));
    }

    #[test]
    fn only_the_clock_is_handed_to_the_host() {
        let forwarded = |number: u32| decode(number, [0; 3]) == GuestCall::Forward;
        assert!(forwarded(guest::PTP));
        // TRNG, paravirtual time, implementation discovery, a standard hypervisor call, an unknown one.
        for number in [0x8400_0050, 0xc400_0053, 0xc500_0020, 0xc600_0040, 0x8500_ff01, 0xc600_0001, 0] {
            assert_eq!(decode(number, [0; 3]), unknown(), "{number:#x}");
        }
    }

    #[test]
    fn a_chunk_ends_with_its_table() {
        let chunk = |start, count| first_chunk(Pages::from_raw(start, count).unwrap()).count();
        assert_eq!((chunk(0, 1024), chunk(500, 1024), chunk(511, 2), chunk(512, 3)), (512, 12, 1, 3));
    }

    #[test]
    fn only_the_calls_about_calls_are_said_to_be_there() {
        let offered = |function: u32| decode(smccc::ARCH_FEATURES, [function.into(), 0, 0]);
        for function in [smccc::VERSION, smccc::ARCH_FEATURES] {
            assert_eq!(offered(function), GuestCall::Answer(answer(SUCCESS)), "{function:#x}");
        }
        // SMCCC_ARCH_SOC_ID, the workarounds 1 to 3, and none.
        for function in [0x8000_0002, 0x8000_8000, 0x8000_7fff, 0x8000_3fff, 0x8000_0003] {
            assert_eq!(offered(function), unknown(), "{function:#x}");
        }
    }
}
