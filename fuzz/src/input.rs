//! Values out of bytes. Bytes that are not there read as zero, so every string of bytes is an input.

/// A reader of an input.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    /// Reads from these bytes.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Whether all has been read.
    pub const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// What has not been read.
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Takes bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (taken, rest) = self.rest.split_at(N.min(self.rest.len()));
        bytes[..taken.len()].copy_from_slice(taken);
        self.rest = rest;
        bytes
    }

    /// Takes a byte.
    pub fn byte(&mut self) -> u8 {
        let [byte] = self.bytes();
        byte
    }

    /// Takes a word.
    pub fn word(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// Takes words.
    pub fn words<const N: usize>(&mut self) -> [u64; N] {
        std::array::from_fn(|_| self.word())
    }

    /// One of these, by one byte, or any word at all where the byte is the last one.
    pub fn pick(&mut self, choices: &[u64]) -> u64 {
        match self.byte() {
            u8::MAX => self.word(),
            byte => choices[usize::from(byte) % choices.len()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_not_there_are_zero() {
        let mut input = Input::new(&[1, 2, 3]);
        assert_eq!((input.byte(), input.word(), input.word()), (1, 0x302, 0));
        assert!(input.is_empty());
    }

    #[test]
    fn a_choice_is_one_of_the_list_or_a_word_of_the_inputs_own() {
        let mut input = Input::new(&[4, 255, 7, 0, 0, 0, 0, 0, 0, 1, 9]);
        assert_eq!((input.pick(&[10, 11, 12]), input.pick(&[10])), (11, 7 | 1 << 56));
        assert_eq!(input.rest(), [9]);
    }
}
