//! The stack of a new program: strings, argument and environment pointers, auxiliary vector
//! (the AArch64 and System V conventions that Linux follows).

use alloc::vec::Vec;

use crate::mm::PAGE;

const AT_NULL: u64 = 0;
const AT_PHDR: u64 = 3;
const AT_PHENT: u64 = 4;
const AT_PHNUM: u64 = 5;
const AT_PAGESZ: u64 = 6;
const AT_ENTRY: u64 = 9;
const AT_UID: u64 = 11;
const AT_EUID: u64 = 12;
const AT_GID: u64 = 13;
const AT_EGID: u64 = 14;
const AT_HWCAP: u64 = 16;
const AT_SECURE: u64 = 23;
const AT_RANDOM: u64 = 25;
const PROGRAM_HEADER_SIZE: u64 = 56;

/// What the stack tells a program.
#[derive(Clone, Debug)]
pub struct StackContent<'a> {
    /// Its arguments.
    pub arguments: &'a [&'a [u8]],
    /// Address of its program headers.
    pub headers: u64,
    /// Their number.
    pub header_count: u16,
    /// Where it starts.
    pub entry: u64,
    /// Sixteen bytes that it cannot foresee.
    pub random: [u8; 16],
}

/// Lays the stack out below `top`. Returns the stack pointer and the bytes from there on.
pub fn build(top: u64, content: &StackContent<'_>) -> (u64, Vec<u8>) {
    // Above: the strings and the random bytes. Offsets are counted from the start of this block.
    let mut strings = Vec::new();
    let mut offsets = Vec::new();
    for argument in content.arguments {
        offsets.push(strings.len() as u64);
        strings.extend_from_slice(argument);
        strings.push(0);
    }
    strings.resize(strings.len().next_multiple_of(16), 0);
    let random = strings.len() as u64;
    strings.extend_from_slice(&content.random);

    let base = top.saturating_sub(strings.len() as u64);
    let at = |offset: u64| base.saturating_add(offset);
    let mut words = alloc::vec![content.arguments.len() as u64];
    words.extend(offsets.into_iter().map(at));
    words.extend([0, 0]); // the ends of the arguments and of an empty environment
    for (kind, value) in [
        (AT_PHDR, content.headers),
        (AT_PHENT, PROGRAM_HEADER_SIZE),
        (AT_PHNUM, content.header_count.into()),
        (AT_PAGESZ, PAGE),
        (AT_ENTRY, content.entry),
        (AT_UID, 0),
        (AT_EUID, 0),
        (AT_GID, 0),
        (AT_EGID, 0),
        (AT_HWCAP, 0),
        (AT_SECURE, 0),
        (AT_RANDOM, at(random)),
        (AT_NULL, 0),
    ] {
        words.extend([kind, value]);
    }
    if words.len() % 2 != 0 {
        words.push(0);
    }
    let pointer = base.saturating_sub(words.len() as u64 * 8);
    let bytes = words.into_iter().flat_map(u64::to_le_bytes).chain(strings).collect();
    (pointer, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_finds_its_arguments_and_auxiliary_vector() {
        let content = StackContent {
            arguments: &[b"/bin/hello", b"-x"],
            headers: 0x40_0040,
            header_count: 2,
            entry: 0x40_0000,
            random: *b"0123456789abcdef",
        };
        let top = 0x10_0000;
        let (pointer, bytes) = build(top, &content);
        assert_eq!(pointer % 16, 0);
        assert_eq!(pointer + bytes.len() as u64, top);
        let word = |index: usize| u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().unwrap());
        let string = |address: u64, length: usize| {
            let start = (address - pointer) as usize;
            &bytes[start..start + length]
        };
        assert_eq!(word(0), 2);
        assert_eq!(string(word(1), 11), b"/bin/hello\0");
        assert_eq!(string(word(2), 3), b"-x\0");
        assert_eq!((word(3), word(4)), (0, 0));
        let auxiliary: Vec<_> =
            (5..).step_by(2).map(|at| (word(at), word(at + 1))).take_while(|pair| pair.0 != 0).collect();
        assert!(auxiliary.contains(&(AT_PAGESZ, 4096)));
        assert!(auxiliary.contains(&(AT_PHDR, 0x40_0040)));
        assert!(auxiliary.contains(&(AT_SECURE, 0)));
        let random = auxiliary.iter().find(|pair| pair.0 == AT_RANDOM).unwrap().1;
        assert_eq!(string(random, 16), b"0123456789abcdef");
    }
}
