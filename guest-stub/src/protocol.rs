//! The protocol between a guest of this package and the program that runs it: one page of device
//! registers, a few commands, and the secret of the default scenario.
//!
//! Everything here is plain numbers, shared by both sides; nothing touches hardware.

/// First byte of guest RAM; the image is loaded and entered here.
pub const RAM_BASE: u64 = 0x8000_0000;
/// Bytes of guest RAM.
pub const RAM_SIZE: u64 = 4 << 20;
/// Size of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// The guest's device: one page, enrolled with `MMIO_GUARD`.
pub const DEVICE_BASE: u64 = 0x0900_0000;
/// A page beside the device that no guest ever enrols.
pub const STRANGER_BASE: u64 = DEVICE_BASE + PAGE_SIZE;

/// Store of 8 bytes: executes a [`Command`] with the data words stored before.
pub const DOORBELL: u64 = 0x000;
/// Stores of 8 bytes: the command's data words, [`DATA_WORDS`] of them.
pub const DATA: u64 = 0x008;
/// Number of data words.
pub const DATA_WORDS: usize = 8;
/// Store of 8 bytes: appends text, first byte lowest; zero bytes are left out.
pub const TEXT: u64 = 0x080;
/// Loads of 8 bytes: values that the VMM provides, [`VALUE_WORDS`] of them.
pub const VALUE: u64 = 0x100;
/// Number of values.
pub const VALUE_WORDS: usize = 16;
/// Loads and stores of any size: a register that keeps what was stored, as 16 bytes of plain memory.
pub const SCRATCH: u64 = 0x200;
/// Bytes of [`SCRATCH`].
pub const SCRATCH_BYTES: usize = 16;

/// What the guest asks for when it rings the doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Command {
    /// The guest has reached a point that the VMM waits for: data word 0 is a [`Phase`] or the guest's own
    /// number, the others belong to it.
    Phase = 1,
    /// The text is a line for people.
    Say = 2,
    /// The text names a step that the guest has checked; data word 0 is what it expected, 1 what it saw.
    Check = 3,
    /// The text says why the guest gives up.
    Panic = 4,
    /// The text names an operation that the guest has counted: data words are the instructions of the
    /// cheapest run, of all runs, and the number of runs.
    Row = 5,
}

impl Command {
    /// Reads a doorbell word.
    pub const fn from_word(word: u64) -> Option<Self> {
        match word {
            1 => Some(Self::Phase),
            2 => Some(Self::Say),
            3 => Some(Self::Check),
            4 => Some(Self::Panic),
            5 => Some(Self::Row),
            _ => None,
        }
    }
}

/// Where the `secret` guest stands. It goes on when the VMM runs it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Phase {
    /// It runs, its device works.
    Ready = 1,
    /// The secret is in its pages and registers. Data words 1 to 3: the pages' addresses.
    Kept = 2,
    /// A buffer is shared and holds the guest's greeting. Data words: address, pages.
    Shared = 3,
    /// The guest has read the host's answer; the buffer is private again. Data words: address, pages.
    Unshared = 4,
    /// Another buffer is shared, to be unshared at the next run. Data words: address, pages.
    SharedAgain = 5,
    /// That buffer is private again. Data words: address, pages.
    UnsharedAgain = 6,
    /// The secret is where it was.
    StillKept = 7,
    /// The second guest has looked at its memory. Data word 1: words that were not zero.
    Looked = 8,
}

impl Phase {
    /// Reads data word 0 of [`Command::Phase`].
    pub const fn from_word(word: u64) -> Option<Self> {
        match word {
            1 => Some(Self::Ready),
            2 => Some(Self::Kept),
            3 => Some(Self::Shared),
            4 => Some(Self::Unshared),
            5 => Some(Self::SharedAgain),
            6 => Some(Self::UnsharedAgain),
            7 => Some(Self::StillKept),
            8 => Some(Self::Looked),
            _ => None,
        }
    }
}

/// Argument of the `secret` guest: make a secret and keep it.
pub const ARGUMENT_KEEP: u64 = 0;
/// Argument of the `secret` guest: look for leftovers in the pages that the first guest used.
pub const ARGUMENT_LOOK: u64 = 1;
/// Argument of the `secret` guest: once the secret is made, hold it in general and vector registers, and never exit.
pub const ARGUMENT_HOLD: u64 = 2;

/// The pages in which the `secret` guest keeps its secret.
pub const SECRET_PAGES: [u64; 3] = [RAM_BASE + 0x10_0000, RAM_BASE + 0x10_1000, RAM_BASE + 0x14_2000];
/// First page that the `secret` guest shares.
pub const BUFFER: u64 = RAM_BASE + 0x18_0000;
/// Pages in that buffer.
pub const BUFFER_PAGES: u64 = 2;
/// The page that the `secret` guest shares with a host that does not unmap it.
pub const SECOND_BUFFER: u64 = RAM_BASE + 0x19_0000;

/// What the guest writes into its shared buffer.
pub const GREETING: u64 = u64::from_le_bytes(*b"guest=hi");
/// What the VMM answers there.
pub const ANSWER: u64 = u64::from_le_bytes(*b"host:yes");

/// What the `player` guest is told to do. It asks by the guest call that is handed to the host (PTP), whose
/// arguments are what came of the last command, and whose results are the next one: an operation and its three
/// arguments. An operation that is none of these is the function id of a call to make.
pub mod player {
    /// Load 8 bytes at an address: reports 0 and the value, or 1 and the syndrome of an exception.
    pub const LOAD: u64 = 1;
    /// Store 8 bytes: reports 0, or 1 and the syndrome of an exception.
    pub const STORE: u64 = 2;
    /// Call the instructions at an address, which return: reports 0, or 1 and the syndrome of an exception.
    pub const FETCH: u64 = 3;
    /// Turn the second vCPU on, which then asks for commands too: reports the result of CPU_ON.
    pub const START: u64 = 4;

    /// Load 8 bytes at an address again and again, and after each load store the number of loads at a second address:
    /// reports 1 and the syndrome of the exception that ends it.
    pub const SPIN_LOAD: u64 = 5;
    /// The same with stores, each of the number of stores before it.
    pub const SPIN_STORE: u64 = 6;

    /// An instruction that returns.
    pub const RET: u32 = 0xd65f_03c0;
    /// Pages of guest RAM, from its start, that the guest's image takes.
    pub const IMAGE_PAGES: u64 = 32;
    /// Number, from the start of guest RAM, of the first page of the window that it plays with. A 2 MiB region
    /// ends in it.
    pub const WINDOW: u64 = 0x1fa;
}

/// The 64 bytes of the secret, as eight little-endian words.
pub type Secret = [u64; 8];

/// Derives the secret from the run's nonce (xorshift64*), so that it exists nowhere before the guest runs.
pub fn secret(nonce: u64) -> Secret {
    let mut state = nonce;
    let mut words = [0; 8];
    for word in &mut words {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        *word = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
    }
    words
}

/// Packs up to eight bytes of text into a word for [`TEXT`].
pub fn text_word(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_depends_on_every_bit_of_the_nonce_and_repeats_no_word() {
        let nonce = 0x0123_4567_89ab_cdef;
        let words = secret(nonce);
        for (index, word) in words.iter().enumerate() {
            assert!(!words[..index].contains(word));
        }
        for bit in 0..64 {
            assert_ne!(secret(nonce ^ 1 << bit), words, "bit {bit}");
        }
    }

    #[test]
    fn the_secret_of_nonce_one_is_the_generators_known_sequence() {
        // xorshift64*, state 1: the first two outputs.
        assert_eq!(secret(1)[..2], [0x47e4_ce4b_896c_dd1d, 0xabcf_a6a8_e079_651d]);
    }

    #[test]
    fn text_survives_its_word() {
        assert_eq!(&text_word(b"abc").to_le_bytes(), b"abc\0\0\0\0\0");
        assert_eq!(&text_word(b"12345678tail").to_le_bytes(), b"12345678");
    }

    #[test]
    fn commands_and_phases_survive_their_words() {
        for command in [Command::Phase, Command::Say, Command::Check, Command::Panic, Command::Row] {
            assert_eq!(Command::from_word(command as u64), Some(command));
        }
        for word in 1..=8 {
            assert_eq!(Phase::from_word(word).map(|phase| phase as u64), Some(word));
        }
        assert_eq!(Command::from_word(0), None);
        assert_eq!(Phase::from_word(9), None);
    }
}
