//! Captions as archives have them: a text file, and images in a directory beside it.

use super::*;

/// Kaggle's archive: bare names in a CSV that is called txt.
const KAGGLE: &str = "image,caption\n1.jpg,\"A dog , running\"\n1.jpg,A pet\n2.jpg,A \"\"boat\"\" at sea\n2.jpg,Water\n";
/// `Flickr8k.token.txt`.
const TOKEN: &str = "1.jpg#0\tA dog , running\n1.jpg#1\tA \"pet\n2.jpg#0\tA boat at sea\n2.jpg#1\tWater\n";

fn flickr(name: &str, table: &str, images: &str) -> Files {
    let files = Files::new(&[&format!("{images}/1.jpg"), &format!("{images}/2.jpg")]);
    files.write(name, table);
    files
}

/// Two images of two captions each, found where they are.
fn check(data: &Dataset, first: &str) {
    let all: Vec<&Example> = SPLITS.into_iter().flat_map(|s| data.split(s)).collect();
    assert_eq!((all.len(), data.classes.len()), (4, 0));
    for e in &all {
        let ImageRef::File(path) = &e.image else { panic!("{} has no file", e.id) };
        assert!(path.is_file(), "{}", path.display());
        assert_eq!(all.iter().filter(|other| other.same_image(e)).count(), 2, "{}", e.id);
    }
    let one = all.iter().find(|e| e.texts[0].starts_with("A dog")).unwrap();
    assert_eq!((one.texts[0].as_str(), one.id.as_str()), ("A dog , running", first));
}

#[test]
fn captions_in_a_text_file_are_about_the_images_beside_it() {
    for (name, table, images) in [
        ("captions.txt", KAGGLE, "Images"),
        ("captions.csv", KAGGLE, "Images"),
        ("Flickr8k.token.txt", TOKEN, "Flicker8k_Dataset"),
        ("results.token", TOKEN, "flickr30k-images"),
        // Flickr30k on Kaggle.
        (
            "results.csv",
            "image_name| comment_number| comment\n1.jpg| 0| A dog , running\n1.jpg| 1| A pet\n2.jpg| 0| A boat\n2.jpg| 1| Water\n",
            "images",
        ),
    ] {
        let files = flickr(name, table, images);
        let located = files.located();
        assert_eq!(located.kind(), "table", "{name}");
        let data = located.open(0).unwrap();
        check(&data, &format!("{images}/1.jpg"));
        assert!(data.notes.iter().any(|n| n.contains(images)), "{name}: {:?}", data.notes);
    }
}

#[test]
fn a_recipe_reads_them_with_and_without_a_directory() {
    let files = flickr("text/Flickr8k.token.txt", TOKEN, "Flickr8k_Dataset/Flicker8k_Dataset");
    files.write("text/readme.txt", "Flickr8k\n");
    let bare = files.table("text/Flickr8k.token.txt");
    check(&bare.open(0).unwrap(), "../Flickr8k_Dataset/Flicker8k_Dataset/1.jpg");
    let mut named = bare.clone();
    named.table.as_mut().unwrap().images = Some(files.at("Flickr8k_Dataset/Flicker8k_Dataset"));
    let data = named.open(0).unwrap();
    check(&data, "../Flickr8k_Dataset/Flicker8k_Dataset/1.jpg");
    assert!(data.notes.iter().all(|n| !n.contains("images are read from")), "{:?}", data.notes);
    // From above both archives.
    check(&files.located().open(0).unwrap(), "../Flickr8k_Dataset/Flicker8k_Dataset/1.jpg");
    // Two sets of captions: somebody has to choose.
    files.write("text/Flickr8k.lemma.token.txt", TOKEN);
    let message = DataConfig::locate(&files.0.path().display().to_string()).unwrap_err().to_string();
    assert!(message.contains("Flickr8k.lemma.token.txt") && message.contains("Flickr8k.token.txt"), "{message}");
}

#[test]
fn images_beside_the_table_stay_there() {
    let files = flickr("captions.txt", KAGGLE, "Images");
    files.write("2.jpg", "another");
    let data = files.table("captions.txt").open(0);
    let data = data.unwrap();
    assert!(SPLITS.iter().flat_map(|s| ids(&data, *s)).all(|id| id == "1.jpg" || id == "2.jpg"));
}

#[test]
fn broken_captions_are_named_and_other_texts_are_no_tables() {
    let files = flickr("Flickr8k.token.txt", &format!("{TOKEN}2.jpg a line without a tab\n"), "Images");
    let message = files.table("Flickr8k.token.txt").open(0).unwrap_err().to_string();
    assert!(message.contains("Flickr8k.token.txt:5"), "{message}");
    files.write("labels.txt", "cat\ndog\n");
    let error = DataConfig::locate(&files.at("labels.txt").display().to_string()).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("image,caption"), "{error}");
}

#[test]
fn one_class_is_said_with_what_to_do() {
    let files = Files::new(&["Images/1.jpg", "Images/2.jpg"]);
    files.write("labels.txt", "cat\ndog\n");
    let located = files.located();
    assert_eq!(located.kind(), "folder");
    let data = located.open(0).unwrap();
    assert!(data.notes.iter().any(|n| n.contains("`Images`") && n.contains("table: { path: FILE, images: DIR }")), "{:?}", data.notes);
    // A table that cannot be read is not passed over.
    files.write("labels.csv", "image,image\n1.jpg,cat\n");
    let message = DataConfig::locate(&files.0.path().display().to_string()).unwrap_err().to_string();
    assert!(message.contains("labels.csv") && message.contains("twice"), "{message}");
}
