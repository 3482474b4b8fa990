//! The device that a guest of `guest-stub` talks to: registers in one page, see `guest_stub::protocol`.

use alloc::string::String;
use alloc::vec::Vec;

use guest_stub::protocol::{
    Command, DATA, DATA_WORDS, DOORBELL, SCRATCH, SCRATCH_BYTES, TEXT, VALUE, VALUE_WORDS,
};

/// Text that a guest may collect before it rings; the rest is dropped.
const TEXT_LIMIT: usize = 1024;

/// The state of one vCPU's view of the device.
#[derive(Clone, Debug, Default)]
pub struct Device {
    data: [u64; DATA_WORDS],
    text: Vec<u8>,
    values: [u64; VALUE_WORDS],
    scratch: [u8; SCRATCH_BYTES],
    strange: u64,
}

/// A rung doorbell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// What the guest asks for; `None` for a word without meaning.
    pub command: Option<Command>,
    /// The data words.
    pub data: [u64; DATA_WORDS],
    /// The text.
    pub text: String,
}

impl Device {
    /// A device that provides these values.
    pub fn new(values: &[u64]) -> Self {
        let mut device = Self::default();
        for (slot, value) in device.values.iter_mut().zip(values) {
            *slot = *value;
        }
        device
    }

    /// Accesses to offsets without a register so far.
    pub fn strange_accesses(&self) -> u64 {
        self.strange
    }

    /// Sixteen bytes of scratch, as the guest left them.
    pub fn scratch(&self) -> &[u8; SCRATCH_BYTES] {
        &self.scratch
    }

    /// Serves a store of `length` bytes; the doorbell's result is what the guest asks for.
    pub fn store(&mut self, offset: u64, length: usize, value: u64) -> Option<Doorbell> {
        if let Some(bytes) = self.scratch_bytes(offset, length) {
            for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *byte = new;
            }
            return None;
        }
        match (offset, length) {
            (DOORBELL, 8) => {
                let text = String::from_utf8_lossy(&core::mem::take(&mut self.text)).into_owned();
                let data = core::mem::take(&mut self.data);
                return Some(Doorbell { command: Command::from_word(value), data, text });
            }
            (TEXT, 8) => {
                let room = TEXT_LIMIT.saturating_sub(self.text.len());
                self.text.extend(value.to_le_bytes().into_iter().filter(|byte| *byte != 0).take(room));
            }
            _ => match word_at(&mut self.data, DATA, offset).filter(|_| length == 8) {
                Some(word) => *word = value,
                None => self.strange += 1,
            },
        }
        None
    }

    /// Serves a load of `length` bytes.
    pub fn load(&mut self, offset: u64, length: usize) -> u64 {
        if let Some(bytes) = self.scratch_bytes(offset, length) {
            return bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        }
        match word_at(&mut self.values, VALUE, offset).filter(|_| length == 8) {
            Some(word) => *word,
            None => {
                self.strange += 1;
                0
            }
        }
    }

    fn scratch_bytes(&mut self, offset: u64, length: usize) -> Option<&mut [u8]> {
        let start = usize::try_from(offset.checked_sub(SCRATCH)?).ok()?;
        self.scratch.get_mut(start..start.checked_add(length)?)
    }
}

fn word_at(words: &mut [u64], base: u64, offset: u64) -> Option<&mut u64> {
    let distance = offset.checked_sub(base)?;
    if distance % 8 != 0 {
        return None;
    }
    words.get_mut(usize::try_from(distance / 8).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_stub::protocol::text_word;

    #[test]
    fn a_doorbell_takes_the_words_and_the_text_that_came_before_it() {
        let mut device = Device::default();
        assert_eq!(device.store(DATA, 8, 7), None);
        assert_eq!(device.store(DATA + 8 * 7, 8, 9), None);
        assert_eq!(device.store(TEXT, 8, text_word(b"a step o")), None);
        assert_eq!(device.store(TEXT, 8, text_word(b"f two")), None);
        let doorbell = device.store(DOORBELL, 8, Command::Check as u64).unwrap();
        assert_eq!(doorbell.command, Some(Command::Check));
        assert_eq!(doorbell.data, [7, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(doorbell.text, "a step of two");
        let next = device.store(DOORBELL, 8, 99).unwrap();
        assert_eq!((next.command, next.data[0], next.text.as_str()), (None, 0, ""));
        assert_eq!(device.strange_accesses(), 0);
    }

    #[test]
    fn values_come_back_and_an_absent_register_reads_zero_and_is_counted() {
        let mut device = Device::new(&[5, 6]);
        assert_eq!(device.load(VALUE + 8, 8), 6);
        assert_eq!(device.load(VALUE + 4, 8), 0);
        assert_eq!(device.load(0xff8, 8), 0);
        assert_eq!(device.load(VALUE, 4), 0);
        assert_eq!(device.store(0xff8, 8, 1), None);
        assert_eq!(device.strange_accesses(), 4);
    }

    #[test]
    fn scratch_keeps_bytes_of_every_size() {
        let mut device = Device::default();
        device.store(SCRATCH, 8, 0x8877_6655_4433_2211);
        device.store(SCRATCH + 1, 1, 0xff);
        assert_eq!(device.load(SCRATCH, 2), 0xff11);
        assert_eq!(device.load(SCRATCH + 4, 4), 0x8877_6655);
        device.store(SCRATCH + 12, 8, 1);
        assert_eq!(device.strange_accesses(), 1, "across the end");
    }
}
