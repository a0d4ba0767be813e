use super::*;
use crate::text::arithmetic::ALPHABET;
use crate::text::characters::write_character_tokenizer;
use crate::text::encode::{LossOn, Render};
use crate::text::record::Record;
use crate::text::tokenizer::Tokenizer;
use proptest::prelude::*;
use std::cell::Cell;

fn tokenizer() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    write_character_tokenizer(folder.path(), ALPHABET).unwrap();
    Tokenizer::open(folder.path()).unwrap()
}

/// A file of these lines, and a cache beside it.
struct Case {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
}

impl Case {
    fn new(lines: &[String]) -> Case {
        let case = Case { folder: tempfile::tempdir().unwrap(), tokenizer: tokenizer() };
        std::fs::write(case.data(), lines.concat()).unwrap();
        case
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data.jsonl")
    }

    /// The documents, and whether they had to be made.
    fn load(&self, share: f64, loss_on: LossOn) -> ([Documents; 2], bool) {
        let encoder = Encoder::new(&self.tokenizer, Render::Auto, loss_on);
        let made = Cell::new(false);
        let cache = Cache::at(&self.folder.path().join("cache"));
        let last = Cell::new(0);
        let documents = cache.documents(&[self.data()], share, &encoder, &mut |progress| {
            assert!(progress.done >= last.get() && progress.done <= progress.all);
            last.set(progress.done);
            made.set(true);
        });
        (documents.unwrap(), made.get())
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.folder.path().join("cache")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

fn lines(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{{\"prompt\": \"{n}+{n}=\", \"completion\": \"{}\"}}\n", n + n)).collect()
}

fn all(documents: &Documents) -> Vec<(Vec<u32>, Vec<bool>)> {
    (0..documents.len())
        .map(|index| documents.get(index).unwrap())
        .map(|d| (d.ids.to_vec(), d.counts.to_vec()))
        .collect()
}

#[test]
fn documents_are_made_once_and_are_those_of_their_records() {
    let case = Case::new(&lines(200));
    let ([train, held_out], made) = case.load(0.25, LossOn::Response);
    assert!(made && case.files().len() == 2);
    let records = dataset::read_records(&case.data()).unwrap();
    let (out, kept): (Vec<Record>, Vec<Record>) =
        records.into_iter().partition(|record| dataset::held_out(record, 0.25).unwrap());
    let encoder = Encoder::new(&case.tokenizer, Render::Auto, LossOn::Response);
    for (documents, records) in [(&train, kept), (&held_out, out)] {
        let expected = Documents::encode(&records, &encoder).unwrap();
        assert!(!expected.is_empty());
        assert_eq!((all(documents), documents.fingerprint()), (all(&expected), expected.fingerprint()));
        assert_eq!(documents.first(3).fingerprint(), expected.first(3).fingerprint());
        assert_ne!(documents.first(3).fingerprint(), expected.fingerprint());
    }
    let (again, made) = case.load(0.25, LossOn::Response);
    assert!(!made);
    assert_eq!(again, [train, held_out]);
}

#[test]
fn other_texts_other_tokens_and_another_share_are_kept_apart() {
    let case = Case::new(&lines(50));
    let (_, made) = case.load(0.0, LossOn::Response);
    assert!(made);
    assert!(case.load(0.5, LossOn::Response).1);
    assert!(case.load(0.0, LossOn::All).1);
    std::fs::write(case.data(), lines(51).concat()).unwrap();
    assert_eq!(case.load(0.0, LossOn::Response).0[0].len(), 51);
    assert_eq!(case.files().len(), 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_file_that_is_cut_off_or_changed_is_made_again(at in 0.0..1.0_f64, cut: bool, side in 0..2_usize, bit in 0..8_u32) {
        let case = Case::new(&lines(40));
        let (whole, _) = case.load(0.5, LossOn::Response);
        let whole = whole.each_ref().map(all);
        let path = &case.files()[side];
        let mut bytes = fs::read(path).unwrap();
        let at = (at * bytes.len() as f64) as usize;
        if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
        fs::write(path, &bytes).unwrap();
        let (again, made) = case.load(0.5, LossOn::Response);
        prop_assert!(made);
        prop_assert_eq!(again.each_ref().map(all), whole);
    }
}

#[test]
fn what_cannot_be_read_leaves_nothing_and_is_named_with_its_row() {
    let case = Case::new(&["{\"messages\": [{\"role\": \"user\", \"content\": \"1\"}]}\n".to_owned()]);
    let encoder = Encoder::new(&case.tokenizer, Render::Auto, LossOn::Response);
    let cache = Cache::at(&case.folder.path().join("cache"));
    let error = cache.documents(&[case.data()], 0.0, &encoder, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("data.jsonl:1: the model has no chat template"), "{error}");
    assert!(case.files().is_empty());
    let file = Cache::at(&case.data());
    std::fs::write(case.data(), lines(1).concat()).unwrap();
    assert!(matches!(file.documents(&[case.data()], 0.0, &encoder, &mut |_| ()), Err(LoadError::Cache { .. })));
    let absent = [case.folder.path().join("absent.jsonl")];
    assert!(matches!(cache.documents(&absent, 0.0, &encoder, &mut |_| ()), Err(LoadError::Dataset(_))));
}
