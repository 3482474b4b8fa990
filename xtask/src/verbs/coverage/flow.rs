//! Which instructions of the EL2 image can lead to nothing but a panic.
//!
//! Of what EL2 checks, much cannot fail whatever host and guests do: sums that do not overflow, indices within their
//! array, invariants. What follows such a check is there to stop the machine if it fails all the same. No test can run
//! it, and one that did would have found a defect, so it counts neither as run nor as missed.
//!
//! Found by following the code backwards from calls of [`ENDS`]: an instruction leads to a panic if whatever can come
//! after it does. A return and a jump to an address in a register lead somewhere unknown.

use std::collections::{BTreeMap, BTreeSet};

/// Where a panic begins: core's functions by their path, and the vectors' code for an exception of EL2 itself.
const ENDS: [&str; 2] = ["core::panicking::", "fatal_exception"];

/// What can come after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// The next instruction.
    Next,
    /// Whatever is at this address.
    Jump(u64),
    /// Either of both.
    Branch(u64),
    /// The next instruction, if the function at this address returns.
    Call(u64),
    /// An exception that EL2 takes for its own fault.
    Trap,
    /// Nobody knows.
    Unknown,
}

/// The instructions that lead to a panic only: of this code, by address, in which functions begin so.
pub(super) fn leads_to_panic(code: &BTreeMap<u64, u32>, functions: &BTreeMap<u64, String>) -> BTreeSet<u64> {
    let is_end = |name: &&String| ENDS.iter().any(|end| name.starts_with(end));
    let ends: BTreeSet<u64> =
        functions.iter().filter(|(_, name)| is_end(name)).map(|(address, _)| *address).collect();
    let mut found = BTreeSet::new();
    loop {
        let before = found.len();
        for (&address, &word) in code.iter().rev() {
            let panics = |at: u64| found.contains(&at);
            let ends_at = |at: u64| ends.contains(&at) || panics(at);
            // A function that ends in a call, of one that does not return, does not go on in its neighbour.
            let goes_on = || {
                let next = address.wrapping_add(4);
                panics(next) && !functions.contains_key(&next)
            };
            let leads = match after(address, word) {
                After::Next => goes_on(),
                After::Jump(target) => ends_at(target),
                After::Branch(target) => ends_at(target) && goes_on(),
                After::Call(target) => ends_at(target) || goes_on(),
                After::Trap => true,
                After::Unknown => false,
            };
            if leads {
                found.insert(address);
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

/// Decodes as much of an instruction as its successors need (Arm ARM, C4.1.66, "Branches, Exception Generating and
/// System instructions"). UDF ends the run as BRK does.
fn after(address: u64, word: u32) -> After {
    let target = |shift: u32, bits: u32| {
        let above = 32 - bits;
        let words = i64::from(((word >> shift) << above).cast_signed() >> above);
        address.wrapping_add_signed(words * 4)
    };
    match word {
        _ if word >> 26 == 0b00_0101 => After::Jump(target(0, 26)),
        _ if word >> 26 == 0b10_0101 => After::Call(target(0, 26)),
        _ if word >> 24 == 0x54 => After::Branch(target(5, 19)),
        _ if word & 0x7e00_0000 == 0x3400_0000 => After::Branch(target(5, 19)),
        _ if word & 0x7e00_0000 == 0x3600_0000 => After::Branch(target(5, 14)),
        _ if word & 0xffff_fc1f == 0xd63f_0000 => After::Next,
        _ if word & 0xfe00_0000 == 0xd600_0000 => After::Unknown,
        _ if word & 0xffe0_001f == 0xd420_0000 || word >> 16 == 0 => After::Trap,
        _ => After::Next,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_after_an_instruction_is_read_from_its_word() {
        // b .+8; b .-4; bl .+8; b.eq .-8; cbz x1, .+12; tbnz w2, #3, .-4; blr x3; ret; eret; brk #1; udf #0; nop
        let words = [
            (0x1400_0002, After::Jump(0x1008)),
            (0x17ff_ffff, After::Jump(0xffc)),
            (0x9400_0002, After::Call(0x1008)),
            (0x54ff_ffc0, After::Branch(0xff8)),
            (0xb400_0061, After::Branch(0x100c)),
            (0x371f_ffe2, After::Branch(0xffc)),
            (0xd63f_0060, After::Next),
            (0xd65f_03c0, After::Unknown),
            (0xd69f_03e0, After::Unknown),
            (0xd420_0020, After::Trap),
            (0, After::Trap),
            (0xd503_201f, After::Next),
        ];
        for (word, expected) in words {
            assert_eq!(after(0x1000, word), expected, "{word:#010x}");
        }
    }

    #[test]
    fn only_what_cannot_go_elsewhere_leads_to_a_panic() {
        let code = BTreeMap::from([
            // A function that checks and may return.
            (0x1000, 0xb400_0061), // cbz x1, 0x100c
            (0x1004, 0xd503_201f), // nop
            (0x1008, 0xd65f_03c0), // ret
            (0x100c, 0xd503_201f), // nop
            (0x1010, 0x9400_0004), // bl 0x1020
            // One that never returns, and its caller.
            (0x1014, 0x1400_0004), // b 0x1024
            (0x1018, 0x97ff_ffff), // bl 0x1014
            (0x101c, 0xd65f_03c0), // ret
            (0x1020, 0xd65f_03c0), // ret
            (0x1024, 0xd65f_03c0), // ret: of the panic function itself nothing is said
        ]);
        let functions = [(0x1000, "check"), (0x1014, "hyp::broken"), (0x1018, "caller"), (0x1020, "other")]
            .into_iter()
            .chain([(0x1024, "core::panicking::panic_fmt")])
            .map(|(address, name)| (address, name.to_owned()))
            .collect::<BTreeMap<_, _>>();
        // 0x1010 calls what returns.
        assert_eq!(leads_to_panic(&code, &functions), BTreeSet::from([0x1014, 0x1018]));
        let code = code.into_iter().map(|(at, word)| (at, if at == 0x1010 { 0x9400_0005 } else { word }));
        let expected = BTreeSet::from([0x100c, 0x1010, 0x1014, 0x1018]);
        assert_eq!(leads_to_panic(&code.collect(), &functions), expected);
    }
}
