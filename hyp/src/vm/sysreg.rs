//! A guest's trapped accesses to system registers.
//!
//! The list says what there is; everything else is UNDEFINED. Identification registers show the features
//! that a guest can use with every register behind them switched: each field is allowed by name and capped,
//! and a field or register that is not listed reads as 0 or as its "not implemented" value
//! (docs/threat-model.md, Hidden features). Pure: the machine is asked for its own identification only.

use crate::machine::IdRegister;
use crate::vm::context::Context;

/// A system register by its encoding: op0, op1, CRn, CRm, op2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Encoding(u8, u8, u8, u8, u8);

/// A trapped MSR or MRS, from ESR_EL2.ISS (Arm ARM, ESR_EL2, exception class 0x18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    encoding: Encoding,
    register: u8,
    read: bool,
}

impl Access {
    fn decode(esr: u64) -> Self {
        let field = |shift: u32, bits: u32| (esr >> shift & !(u64::MAX << bits)) as u8;
        Self {
            encoding: Encoding(field(20, 2), field(14, 3), field(10, 4), field(1, 4), field(17, 3)),
            register: field(5, 5),
            read: esr & 1 != 0,
        }
    }
}

/// What a register is to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Reads as this; a write is UNDEFINED.
    ReadOnly(u64),
    /// Reads as zero, writes are dropped.
    Zero,
    /// Reads as this, writes are dropped.
    Fixed(u64),
}

/// Serves a trapped access and steps over it; `None` if it is UNDEFINED.
pub fn emulate(esr: u64, context: &mut Context, hardware: impl FnOnce(IdRegister) -> u64) -> Option<()> {
    let access = Access::decode(esr);
    let value = match (kind(access.encoding, hardware)?, access.read) {
        (Kind::ReadOnly(value) | Kind::Fixed(value), true) => Some(value),
        (Kind::Zero, true) => Some(0),
        (Kind::Zero | Kind::Fixed(_), false) => None,
        (Kind::ReadOnly(_), false) => return None,
    };
    if let Some(value) = value {
        context.set_x(access.register, value);
    }
    context.skip_instruction();
    Some(())
}

/// Breakpoints and watchpoints that ID_AA64DFR0_EL1 tells of, the fewest that the architecture allows. They
/// never match: their registers read as zero.
const DEBUG_PAIRS: u8 = 2;

fn kind(encoding: Encoding, hardware: impl FnOnce(IdRegister) -> u64) -> Option<Kind> {
    Some(match encoding {
        // The space of identification registers, ID_PFR0_EL1 to ID_AA64MMFR7_EL1.
        Encoding(3, 0, 0, crm @ 1..=7, op2) => Kind::ReadOnly(identification(crm, op2, hardware)),
        // REVIDR_EL1, AIDR_EL1.
        Encoding(3, 0, 0, 0, 6) | Encoding(3, 1, 0, 0, 7) => Kind::ReadOnly(0),
        // ACTLR_EL1.
        Encoding(3, 0, 1, 0, 1) => Kind::Zero,
        // MDCCINT_EL1, MDSCR_EL1, OSDTRRX_EL1, OSDTRTX_EL1, OSECCR_EL1.
        Encoding(2, 0, 0, 2, 0 | 2) | Encoding(2, 0, 0, 0 | 3, 2) | Encoding(2, 0, 0, 6, 2) => Kind::Zero,
        // DBGBVRn_EL1, DBGBCRn_EL1, DBGWVRn_EL1, DBGWCRn_EL1.
        Encoding(2, 0, 0, 0..DEBUG_PAIRS, 4..=7) => Kind::Zero,
        // MDRAR_EL1, DBGAUTHSTATUS_EL1.
        Encoding(2, 0, 1, 0, 0) | Encoding(2, 0, 7, 14, 6) => Kind::ReadOnly(0),
        // OSLAR_EL1, OSDLR_EL1, DBGPRCR_EL1.
        Encoding(2, 0, 1, 0 | 3 | 4, 4) => Kind::Zero,
        // OSLSR_EL1: the lock exists (OSLM = 0b10) and is open.
        Encoding(2, 0, 1, 1, 4) => Kind::Fixed(1 << 3),
        // DBGCLAIMSET_EL1, DBGCLAIMCLR_EL1.
        Encoding(2, 0, 7, 8 | 9, 6) => Kind::Zero,
        // MDCCSR_EL0, DBGDTR_EL0, DBGDTRRX_EL0 and DBGDTRTX_EL0.
        Encoding(2, 3, 0, 1, 0) => Kind::ReadOnly(0),
        Encoding(2, 3, 0, 4 | 5, 0) => Kind::Zero,
        _ => return None,
    })
}

/// What a guest may see of one field.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// The machine's value, but at most this. For fields where more means more.
    Cap(u64),
    /// The machine's value: a field where 0xf means "not implemented", with at most this otherwise.
    SignedCap(u64),
    /// This, whatever the machine has.
    Is(u64),
}

use Rule::{Cap, Is, SignedCap};

/// Fields by their lowest bit; a field that is not listed reads as 0. Names are in the order of the list.
type Fields = &'static [(u32, Rule)];

/// EL0 and EL1 in AArch64 only; FP; AdvSIMD; DIT; CSV2 (1: SCXTNUM_ELx stays hidden); CSV3. Not: EL2, EL3,
/// GIC, RAS, SVE, MPAM, AMU, RME.
const PFR0: Fields = &[
    (0, Is(1)),
    (4, Is(1)),
    (16, SignedCap(1)),
    (20, SignedCap(1)),
    (48, Cap(1)),
    (56, Cap(1)),
    (60, Cap(1)),
];

/// BT; SSBS. Not: MTE, SME, NMI.
const PFR1: Fields = &[(0, Cap(1)), (4, Cap(2))];

/// DebugVer (Armv8.0); BRPs and WRPs, each less one; DoubleLock and MTPMU, not implemented. Not: PMU, trace,
/// SPE, TRBE, BRBE.
const DFR0: Fields = &[
    (0, Is(6)),
    (12, Is(DEBUG_PAIRS as u64 - 1)),
    (20, Is(DEBUG_PAIRS as u64 - 1)),
    (36, Is(0xf)),
    (48, Is(0xf)),
];

/// AES, SHA1, SHA2, CRC32, Atomic, RDM, SHA3, SM3, SM4, DP, FHM, TS, TLB, RNDR. Not: TME.
const ISAR0: Fields = &[
    (4, Cap(2)),
    (8, Cap(1)),
    (12, Cap(2)),
    (16, Cap(1)),
    (20, Cap(2)),
    (28, Cap(1)),
    (32, Cap(1)),
    (36, Cap(1)),
    (40, Cap(1)),
    (44, Cap(1)),
    (48, Cap(1)),
    (52, Cap(2)),
    (56, Cap(2)),
    (60, Cap(1)),
];

/// DPB, APA, API, JSCVT, FCMA, LRCPC, GPA, GPI, FRINTTS, SB, SPECRES, BF16, DGH, I8MM. The keys of pointer
/// authentication are switched. Not: XS, LS64.
const ISAR1: Fields = &[
    (0, Cap(2)),
    (4, Cap(5)),
    (8, Cap(5)),
    (12, Cap(1)),
    (16, Cap(1)),
    (20, Cap(2)),
    (24, Cap(1)),
    (28, Cap(1)),
    (32, Cap(1)),
    (36, Cap(1)),
    (40, Cap(1)),
    (44, Cap(2)),
    (48, Cap(1)),
    (52, Cap(1)),
];

/// RPRES, GPA3, APA3, BC, PAC_frac, CLRBHB, RPRFM, CSSC. Not: WFxT, MOPS, 128-bit system registers.
const ISAR2: Fields = &[
    (4, Cap(1)),
    (8, Cap(1)),
    (12, Cap(5)),
    (20, Cap(1)),
    (24, Cap(1)),
    (28, Cap(1)),
    (48, Cap(1)),
    (52, Cap(1)),
];

/// PARange (40 bits: what a guest's stage 2 translates), ASIDBits, BigEnd, BigEndEL0, TGran16, TGran64,
/// TGran4 (without the 52-bit forms), and the stage-2 granules, which a guest without EL2 does not have.
const MMFR0: Fields = &[
    (0, Cap(2)),
    (4, Cap(2)),
    (8, Cap(1)),
    (16, Cap(1)),
    (20, Cap(1)),
    (24, SignedCap(0)),
    (28, SignedCap(0)),
    (32, Is(1)),
    (36, Is(1)),
    (40, Is(1)),
];

/// HAFDBS, HPDS, PAN, ETS, AFP, nTLBPA, ECBHB. Not: VHE, LOR, TWED, HCX, TIDCP1, CMOW.
const MMFR1: Fields =
    &[(0, Cap(2)), (12, Cap(2)), (20, Cap(3)), (36, Cap(2)), (44, Cap(1)), (48, Cap(1)), (60, Cap(1))];

/// CnP, UAO, LSM, VARange, CCIDX, ST, AT, TTL, BBM, E0PD. Not: IESB, NV, IDS, FWB, EVT.
const MMFR2: Fields = &[
    (0, Cap(1)),
    (4, Cap(1)),
    (8, Cap(1)),
    (16, Cap(1)),
    (20, Cap(1)),
    (28, Cap(1)),
    (32, Cap(1)),
    (48, Cap(1)),
    (52, Cap(2)),
    (60, Cap(1)),
];

/// The value of an identification register.
fn identification(crm: u8, op2: u8, hardware: impl FnOnce(IdRegister) -> u64) -> u64 {
    let (fields, register) = match (crm, op2) {
        (4, 0) => (PFR0, IdRegister::Pfr0),
        (4, 1) => (PFR1, IdRegister::Pfr1),
        (5, 0) => return restrict(0, DFR0),
        (6, 0) => (ISAR0, IdRegister::Isar0),
        (6, 1) => (ISAR1, IdRegister::Isar1),
        (6, 2) => (ISAR2, IdRegister::Isar2),
        (7, 0) => (MMFR0, IdRegister::Mmfr0),
        (7, 1) => (MMFR1, IdRegister::Mmfr1),
        (7, 2) => (MMFR2, IdRegister::Mmfr2),
        // AArch32 identification, SVE, SME, and what the architecture has still in reserve.
        _ => return 0,
    };
    restrict(hardware(register), fields)
}

/// Applies the rules to a register of the machine.
fn restrict(value: u64, fields: Fields) -> u64 {
    const NOT_IMPLEMENTED: u64 = 0xf;
    fields.iter().fold(0, |seen, (shift, rule)| {
        let field = value >> shift & 0xf;
        let shown = match *rule {
            Cap(most) => field.min(most),
            SignedCap(_) if field == NOT_IMPLEMENTED => field,
            SignedCap(most) => field.min(most),
            Is(fixed) => fixed,
        };
        seen | shown << shift
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn esr(Encoding(op0, op1, crn, crm, op2): Encoding, register: u64, read: bool) -> u64 {
        u64::from(op0) << 20
            | u64::from(op2) << 17
            | u64::from(op1) << 14
            | u64::from(crn) << 10
            | register << 5
            | u64::from(crm) << 1
            | u64::from(read)
    }

    fn read(encoding: Encoding, machine: u64) -> Option<u64> {
        let mut context = Context::default();
        emulate(esr(encoding, 7, true), &mut context, |_| machine)?;
        assert_eq!(context.pc, 4);
        Some(context.x(7))
    }

    fn field(value: u64, shift: u32) -> u64 {
        value >> shift & 0xf
    }

    #[test]
    fn a_guest_of_a_machine_with_everything_sees_no_more_than_the_list() {
        let pfr0 = read(Encoding(3, 0, 0, 4, 0), 0x2222_2222_2211_2222).unwrap();
        assert_eq!(pfr0, 0x1100_0000_0011_0011 | 1 << 48);
        let pfr1 = read(Encoding(3, 0, 0, 4, 1), u64::MAX).unwrap();
        assert_eq!(pfr1, 0x21);
        assert_eq!(read(Encoding(3, 0, 0, 5, 0), u64::MAX), Some(0x000f_00f0_0010_1006));
        for (crm, op2) in (1..4).flat_map(|crm| (0..8).map(move |op2| (crm, op2))).chain([
            (4, 2),
            (4, 4),
            (4, 5),
            (5, 1),
            (6, 3),
            (7, 3),
            (7, 4),
        ]) {
            assert_eq!(read(Encoding(3, 0, 0, crm, op2), u64::MAX), Some(0), "{crm} {op2}");
        }
    }

    #[test]
    fn granules_and_the_physical_range_fit_the_guests_stage_2() {
        let large = read(Encoding(3, 0, 0, 7, 0), 0x0000_0222_1f12_2226).unwrap();
        assert_eq!(field(large, 0), 2, "PARange");
        assert_eq!(field(large, 28), 0, "TGran4 without LPA2");
        assert_eq!(field(large, 24), 0xf, "TGran64 not implemented");
        assert_eq!(field(large, 20), 1, "TGran16 without LPA2");
        assert_eq!((field(large, 32), field(large, 36), field(large, 40)), (1, 1, 1));
        let small = read(Encoding(3, 0, 0, 7, 0), 1).unwrap();
        assert_eq!(field(small, 0), 1);
    }

    #[test]
    fn fp_that_is_not_there_stays_absent() {
        let pfr0 = read(Encoding(3, 0, 0, 4, 0), 0xf << 16 | 0xf << 20).unwrap();
        assert_eq!((field(pfr0, 16), field(pfr0, 20)), (0xf, 0xf));
    }

    #[test]
    fn each_identification_register_is_the_machines_own_of_that_name() {
        let asked = |crm, op2| {
            let mut asked = None;
            identification(crm, op2, |register| {
                asked = Some(register);
                0
            });
            asked
        };
        use IdRegister::*;
        let names = [(4, 0, Pfr0), (4, 1, Pfr1), (6, 0, Isar0), (6, 1, Isar1), (6, 2, Isar2)];
        for (crm, op2, register) in names.into_iter().chain([(7, 0, Mmfr0), (7, 1, Mmfr1), (7, 2, Mmfr2)]) {
            assert_eq!(asked(crm, op2), Some(register));
        }
        assert_eq!((asked(5, 0), asked(6, 3), asked(7, 3)), (None, None, None));
    }

    /// Arm ARM D24 and H9: those that read as zero, and whether a guest may write them.
    #[test]
    fn registers_without_a_meaning_for_a_guest_read_as_zero() {
        let read_only = [
            Encoding(3, 0, 0, 0, 6),  // REVIDR_EL1
            Encoding(3, 1, 0, 0, 7),  // AIDR_EL1
            Encoding(2, 0, 1, 0, 0),  // MDRAR_EL1
            Encoding(2, 0, 7, 14, 6), // DBGAUTHSTATUS_EL1
            Encoding(2, 3, 0, 1, 0),  // MDCCSR_EL0
        ];
        let written = [
            Encoding(3, 0, 1, 0, 1), // ACTLR_EL1
            Encoding(2, 0, 1, 0, 4), // OSLAR_EL1
            Encoding(2, 0, 1, 3, 4), // OSDLR_EL1
            Encoding(2, 0, 1, 4, 4), // DBGPRCR_EL1
            Encoding(2, 0, 7, 8, 6), // DBGCLAIMSET_EL1
            Encoding(2, 0, 7, 9, 6), // DBGCLAIMCLR_EL1
            Encoding(2, 3, 0, 4, 0), // DBGDTR_EL0
            Encoding(2, 3, 0, 5, 0), // DBGDTRRX_EL0
        ];
        let write = |encoding| emulate(esr(encoding, 7, false), &mut Context::default(), |_| 1).is_some();
        for encoding in read_only.into_iter().chain(written) {
            assert_eq!(read(encoding, 1), Some(0), "{encoding:?}");
            assert_eq!(write(encoding), written.contains(&encoding), "{encoding:?}");
        }
    }

    #[test]
    fn a_register_that_is_not_listed_is_undefined() {
        for encoding in [
            Encoding(3, 0, 12, 12, 5), // ICC_SRE_EL1
            Encoding(3, 3, 14, 2, 1),  // CNTP_CTL_EL0
            Encoding(3, 3, 9, 12, 0),  // PMCR_EL0
            Encoding(3, 0, 5, 3, 0),   // ERRIDR_EL1
            Encoding(3, 0, 10, 4, 0),  // LORSA_EL1
            Encoding(1, 0, 7, 6, 2),   // DC ISW
            Encoding(2, 0, 0, 2, 4),   // DBGBVR2_EL1
            Encoding(3, 3, 15, 0, 0),  // implementation defined
        ] {
            assert_eq!(read(encoding, 0), None, "{encoding:?}");
        }
    }

    #[test]
    fn debug_registers_read_as_zero_and_drop_writes() {
        let mut context = Context::default();
        context.set_x(7, 5);
        let mdscr = Encoding(2, 0, 0, 2, 2);
        assert_eq!(emulate(esr(mdscr, 7, false), &mut context, |_| 1), Some(()));
        assert_eq!((context.pc, context.x(7)), (4, 5));
        assert_eq!(read(mdscr, 1), Some(0));
        assert_eq!(read(Encoding(2, 0, 0, 1, 7), 1), Some(0));
        assert_eq!(read(Encoding(2, 0, 1, 1, 4), 1), Some(8));
    }

    #[test]
    fn a_write_to_an_identification_register_is_undefined() {
        let mut context = Context::default();
        assert_eq!(emulate(esr(Encoding(3, 0, 0, 4, 0), 0, false), &mut context, |_| 0), None);
        assert_eq!(context.pc, 0);
    }

    #[test]
    fn no_syndrome_makes_the_emulation_go_wrong() {
        for bits in 0..1 << 22 {
            let mut context = Context::default();
            let served = emulate(bits, &mut context, |_| u64::MAX).is_some();
            assert_eq!(context.pc, if served { 4 } else { 0 });
        }
    }
}
